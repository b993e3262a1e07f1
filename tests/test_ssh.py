"""Runs on two "hosts" over a real sshd: ranks meet, nothing is left behind whoever dies, nothing falls back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import process
from launcher.backends.base import STAGE_TAG
from launcher.cli import main
from launcher.on_host import HOST_TAG, Request
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState
from launcher.status import read_status
from tests.ranks import LIMIT_S
from tests.recipes import write_recipe
from tests.sshd import missing, server
from tests.waiting import until
from vqscale.config.layout import RunLayout
from vqscale.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ("one", "two")
SPARE = "three"

needs_sshd = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with server(tmp_path_factory.mktemp("sshd"), (*HOSTS, SPARE)) as client:
        yield client


@pytest.fixture
def on(config: Path, home: Path) -> Path:
    """A profile of two hosts with room for one process each."""
    path = home / "hosts.yaml"
    ssh = {"hosts": [f"{host} slots=1 address=127.0.0.1" for host in HOSTS], "cores": 2, "config": str(config)}
    ssh["requeues"] = 0
    tree = {"name": "hosts", "backend": "ssh", "environment": {"GLOO_SOCKET_IFNAME": "lo"}, "grace_s": 3, "ssh": ssh}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def layout(on: Path, home: Path) -> Iterator[RunLayout]:
    recipe = write_recipe(home / "r.yaml", resources__processes=2)
    made = create(make_plan(str(recipe), str(on), run=home / "with space/mine", stages="generate,pack"))
    yield made
    process.end_tagged(STAGE_TAG, str(made.root), grace_s=0)


def start(layout: RunLayout, *acts: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.fake_stages.supervisor", str(layout.root), *acts]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def begun(layout: RunLayout) -> dict[str, dict[str, Any]]:
    """Host → pid and environment of its fake agent, once both run."""
    files = {host: layout.stage("generate") / f"on-{host}" for host in HOSTS}
    until(lambda: all(path.exists() for path in files.values()), layout)
    return {host: json.loads(path.read_bytes()) for host, path in files.items()}


def left(layout: RunLayout) -> list[int]:
    on_hosts = [pid for host in HOSTS for pid in process.tagged(HOST_TAG, f"{host}:{layout.root}")]
    return on_hosts + process.tagged(STAGE_TAG, str(layout.root))


def agent_log(layout: RunLayout) -> str:
    return (layout.attempt("generate", 1) / "agent.log").read_text()


@needs_sshd
@pytest.mark.dist
def test_submit_runs_a_stage_whose_ranks_meet_over_two_hosts(on: Path, home: Path) -> None:
    """By the command line, with the run's own supervisor, torch's agents, and a real main."""
    recipe = write_recipe(home / "r.yaml", resources__processes=2)
    run = RunLayout(home / "real")
    assert main(["submit", str(recipe), "--on", str(on), "--run", str(run.root), "--stages", "generate"]) == 0
    until(lambda: read_status(run).over, run)
    assert read_status(run).words == "done", agent_log(run)
    assert {note.read_text() for note in run.root.glob("stages/generate/attempt-001/ranks/*/*/*/rank")} == {"0", "1"}
    agents = {note.parents[2] for note in run.root.glob("stages/generate/attempt-001/ranks/*/*/*/rank")}
    assert len(agents) == 2, "each rank under the agent of its host"
    assert len(list(run.images("train").rglob("*.png"))) == 64, "each rank has made its share"
    assert not left(run)


@needs_sshd
@pytest.mark.fault
def test_cancel_leaves_no_process_on_any_host(layout: RunLayout) -> None:
    supervisor = start(layout, "generate=hosts")
    agents = begun(layout)
    assert {agent[HOST_TAG] for agent in agents.values()} == {f"{host}:{layout.root}" for host in HOSTS}
    assert len(left(layout)) >= 5, "on each host an agent and its deaf child; and who holds the connections"
    assert main(["cancel", "mine"]) == 0
    assert supervisor.wait(LIMIT_S) == 1
    assert not left(layout)
    assert RunState.read(layout).stages["generate"].state == "cancelled"


@needs_sshd
@pytest.mark.fault
@pytest.mark.parametrize(
    "victim",
    ["agent", "on_host", "supervisor", *(pytest.param(one, marks=pytest.mark.slow) for one in ("connection", "hosts"))],
)
def test_whoever_dies_the_stage_ends_everywhere(layout: RunLayout, victim: str) -> None:
    supervisor = start(layout, "generate=hosts")
    agent = begun(layout)["two"]["pid"]
    holder = parent_of(next(pid for pid in process.tagged(STAGE_TAG, str(layout.root)) if b"ssh" in command(pid)))
    victims = {
        "agent": agent,
        "on_host": parent_of(agent),
        "connection": next(pid for pid in children_of(holder) if b"two" in command(pid)),
        "hosts": holder,
        "supervisor": supervisor.pid,
    }
    os.kill(victims[victim], signal.SIGKILL)
    supervisor.wait(LIMIT_S)
    until(lambda: not left(layout), layout)
    state = RunState.read(layout).stages["generate"]
    assert state.state == ("running" if victim == "supervisor" else "failed")
    if victim in ("agent", "on_host", "connection"):
        assert "two has failed: the others are stopped" in agent_log(layout)
        assert "two: ended with code" in state.message


@needs_sshd
@pytest.mark.fault
def test_a_preemption_reaches_all_hosts(layout: RunLayout) -> None:
    supervisor = start(layout, "generate=hosts")
    begun(layout)
    supervisor.send_signal(signal.SIGUSR2)
    supervisor.wait(LIMIT_S)
    state = RunState.read(layout).stages["generate"]
    assert (state.state, state.message) == ("preempted", "preempted, saved at step 3")
    log = agent_log(layout)
    assert "one: saved" in log
    assert "two: saved" in log
    assert not left(layout)


@needs_sshd
def test_the_environment_is_the_allow_listed_one(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    nasty = "$(touch canary) '; touch canary; ' \"`touch canary`\"\n*"
    for name in ("AWS_PROFILE", "MY_TOKEN", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, nasty)
    monkeypatch.setenv("TMPDIR", "/only-here")
    supervisor = start(layout, "generate=hosts")
    given = begun(layout)["one"]
    assert given["AWS_PROFILE"] == nasty
    assert given["GLOO_SOCKET_IFNAME"] == "lo"
    assert not {"MY_TOKEN", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "SSH_AUTH_SOCK", "TMPDIR"} & set(given)
    told = next(pid for pid in process.tagged(STAGE_TAG, str(layout.root)) if b"ssh" in command(pid))
    assert b"AWS" not in command(told), "what is sent cannot be seen in a list of processes"
    supervisor.terminate()
    supervisor.wait(LIMIT_S)
    assert not list(ROOT.glob("canary"))


def with_a_lost_host(on: Path, home: Path, *more: str, **limits: int) -> RunLayout:
    """A run of two ranks whose second host cannot be reached; more hosts behind it."""
    tree = yaml.safe_load(on.read_text())
    tree["ssh"]["hosts"][1:] = ["nowhere.invalid slots=1", *(f"{host} slots=1 address=127.0.0.1" for host in more)]
    tree["ssh"] |= limits
    on.write_text(yaml.safe_dump(tree))
    recipe = write_recipe(home / "r.yaml", resources__processes=2)
    return create(make_plan(str(recipe), str(on), run=home / "mine", stages="generate"))


@needs_sshd
def test_a_host_that_cannot_be_reached_fails_the_stage(on: Path, home: Path) -> None:
    """The others have no room for all ranks. Nothing falls back to fewer ranks, or to this machine."""
    layout = with_a_lost_host(on, home, requeues=5, retries=1, pause_s=0)
    assert start(layout, "generate=hosts").wait(LIMIT_S) == 1
    state = RunState.read(layout).stages["generate"]
    assert (state.state, state.attempt) == ("failed", 2)
    assert state.message.startswith("node: nowhere.invalid does not answer; ")
    assert "nowhere.invalid: ended with code 255 (ssh)" in state.message
    assert state.message.endswith("; not tried again: failed 2 times in a row without progress")
    assert "Could not resolve hostname" in agent_log(layout)
    assert not left(layout)
    assert main(["requeue", "mine", "--stages", "generate"]) == 0
    assert main(["cancel", "mine"]) == 2, "what may be left there cannot be known"


@needs_sshd
@pytest.mark.fault
def test_a_stage_goes_on_without_the_host_that_is_lost(
    on: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one has room for its ranks; the pause before can be cancelled, and a requeue by hand begins anew."""
    layout = with_a_lost_host(on, home, SPARE, requeues=5, pause_s=600)
    supervisor = start(layout, "generate=hosts")
    # Before it is judged, the attempt is put down as failed, for a moment.
    until(lambda: "tried again" in RunState.read(layout).stages["generate"].message, layout)
    assert main(["status", "mine"]) == 0
    told = "node: nowhere.invalid does not answer; "
    shown = " ".join(capsys.readouterr().out.split())
    assert f"generate: {told}" in shown
    assert "tried again (1 of 5), without nowhere.invalid, after 600 s" in shown
    supervisor.terminate()
    assert supervisor.wait(LIMIT_S) == 1
    assert RunState.read(layout).stages["generate"].state == "cancelled"
    tree = read_json(layout.info)
    tree["profile"]["ssh"]["pause_s"] = 0
    write_json(layout.info, tree)
    supervisor = start(layout, "generate=hosts")
    until(lambda: (layout.stage("generate") / f"on-{SPARE}").exists(), layout)
    entry = RunState.read(layout).stages["generate"]
    assert (entry.state, entry.attempt) == ("running", 3)
    given = json.loads((layout.stage("generate") / f"on-{SPARE}").read_bytes())
    assert given["VQSCALE_NODE"] == SPARE
    supervisor.terminate()
    assert supervisor.wait(LIMIT_S) == 1
    assert not process.tagged(HOST_TAG, f"{SPARE}:{layout.root}")


@needs_sshd
def test_what_a_dead_supervisor_left_on_hosts_is_ended_by_cancel(layout: RunLayout) -> None:
    tagged = {**os.environ, HOST_TAG: f"two:{layout.root}"}
    stray = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=tagged)
    assert main(["cancel", "mine"]) == 0
    assert stray.wait(LIMIT_S) == -signal.SIGTERM


def on_host(request: Request, silence_s: float = 600) -> subprocess.Popen[bytes]:
    code = f"import sys, launcher.on_host as m; m._SILENCE_S = {silence_s}; sys.exit(m.main())"
    made = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert made.stdin is not None
    made.stdin.write(request.line())
    made.stdin.flush()
    return made


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    (tmp_path / "run.json").write_text("{}")
    code = f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(600)"
    return Request("one", str(tmp_path), [sys.executable, "-c", code], {}, str(ROOT), grace_s=1)


@pytest.mark.fault
@pytest.mark.parametrize("how", ["closed", "silent"])
def test_a_host_that_hears_nobody_ends_its_processes(request_: Request, how: str) -> None:
    host = on_host(request_, silence_s=5 if how == "silent" else 600)
    assert host.stdin is not None

    def begun() -> bool:
        """Says that somebody is there as long as the stage has not begun."""
        with suppress(BrokenPipeError):
            host.stdin.write(b"\n")
            host.stdin.flush()
        return (Path(request_.run) / "begun").exists()

    until(begun)
    if how == "closed":
        host.stdin.close()
    assert host.wait(LIMIT_S) == 128 + signal.SIGTERM
    assert host.stderr is not None
    assert b"nobody is there any more" in host.stderr.read()
    assert not process.tagged(HOST_TAG, request_.tag)


def test_a_host_without_the_shared_files_says_so(request_: Request) -> None:
    (Path(request_.run) / "run.json").unlink()
    host = on_host(request_)
    assert host.wait(LIMIT_S) == 2
    assert host.stderr is not None
    assert b"run.json is not there; the hosts need one file system" in host.stderr.read()


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
