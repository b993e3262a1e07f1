"""The supervisor over fake stages: outcomes, skipping, cancelling, dying; and real ranks under torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import process
from launcher.backends.base import STAGE_TAG
from launcher.backends.local import LocalBackend
from launcher.cli import main
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState
from launcher.status import read_status
from tests.ranks import LIMIT_S
from tests.recipes import write_recipe
from tests.waiting import until
from vqscale.config.layout import RunLayout
from vqscale.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def layout(home: Path) -> Iterator[RunLayout]:
    path = write_recipe(home / "r.yaml", resources__processes=2)
    made = create(make_plan(str(path), run=home / "mine", stages="generate,pack,tokenizer"))
    yield made
    process.end_tagged(STAGE_TAG, str(made.root), grace_s=0)


def start(layout: RunLayout, *acts: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.fake_stages.supervisor", str(layout.root), *acts]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def run(layout: RunLayout, *acts: str) -> int:
    return start(layout, *acts).wait(LIMIT_S)


def words(layout: RunLayout) -> list[str]:
    return [stage.state for stage in RunState.read(layout).stages.values()]


def no_process_left(layout: RunLayout) -> bool:
    return not process.tagged(STAGE_TAG, str(layout.root))


def test_success_is_decided_by_the_marker(layout: RunLayout) -> None:
    assert run(layout) == 0
    assert words(layout) == ["done", "done", "done"]
    status = read_status(layout)
    assert (status.words, status.stages[0].step, status.stages[0].total) == ("done", 4, 4)


def test_a_marker_of_another_machine_is_waited_for(layout: RunLayout) -> None:
    """A file system that machines share shows a file later than the connection tells of the end."""
    layout.stage("pack").mkdir(parents=True)
    assert run(layout, "pack=late") == 0
    assert words(layout) == ["done", "done", "done"]


def test_failure_names_its_reason_and_stops(layout: RunLayout) -> None:
    assert run(layout, "pack=fail") == 1
    assert words(layout) == ["done", "failed", "waiting"]
    assert RunState.read(layout).stages["pack"].message == "the dog ate the shards"
    assert run(layout, "pack=mute") == 1
    entry = RunState.read(layout).stages["pack"]
    assert entry.attempt == 2
    assert "killed by signal 9: Segmentation fault" in entry.message


def test_finished_stages_are_skipped(layout: RunLayout) -> None:
    write_json(layout.done("generate"), {"by": "hand"})
    assert run(layout, "generate=fail", "tokenizer=fail") == 1
    assert run(layout, "generate=fail", "pack=fail") == 0
    stages = RunState.read(layout).stages
    assert [stage.attempt for stage in stages.values()] == [0, 1, 2]
    assert not layout.failure("tokenizer").exists()


@pytest.mark.fault
def test_cancel_leaves_no_process(layout: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    supervisor = start(layout, "pack=hang")
    pids = layout.stage("pack") / "pids"
    until(pids.exists, layout)
    assert main(["cancel", "mine"]) == 0
    assert "mine: cancelled" in capsys.readouterr().out
    assert supervisor.wait(LIMIT_S) == 1
    assert words(layout) == ["done", "cancelled", "waiting"]
    assert not any(Path("/proc", pid).exists() for pid in pids.read_text().split()), "all are reaped"
    assert main(["cancel", "mine"]) == 2


@pytest.mark.fault
def test_killed_supervisor_takes_its_stage_along(layout: RunLayout) -> None:
    supervisor = start(layout, "generate=hang")
    pids = layout.stage("generate") / "pids"
    until(pids.exists, layout)
    supervisor.kill()
    supervisor.wait()
    stage, deaf = map(int, pids.read_text().split())
    until(lambda: stage not in process.tagged(STAGE_TAG, str(layout.root)), layout)
    status = read_status(layout)
    assert status.state == "running"
    assert "its supervisor is gone: vqscale requeue mine" in status.words
    assert deaf in process.tagged(STAGE_TAG, str(layout.root))
    assert run(layout) == 0, "the next supervisor ends what was deaf to TERM, and goes on"
    assert no_process_left(layout)
    assert RunState.read(layout).stages["generate"].attempt == 2


@pytest.mark.fault
def test_cancel_without_a_supervisor(layout: RunLayout) -> None:
    supervisor = start(layout, "generate=hang")
    until((layout.stage("generate") / "pids").exists, layout)
    supervisor.kill()
    supervisor.wait()
    LocalBackend().cancel(layout)
    assert no_process_left(layout)
    assert words(layout)[0] == "cancelled"


@pytest.mark.fault
def test_one_supervisor_at_a_time(layout: RunLayout, capfd: pytest.CaptureFixture[str]) -> None:
    first = start(layout, "generate=hang")
    until((layout.stage("generate") / "pids").exists, layout)
    assert start(layout).wait(LIMIT_S) != 0
    assert "another supervisor works on this run" in capfd.readouterr().err
    assert read_json(layout.supervisor)["pid"] == first.pid
    assert main(["requeue", "mine"]) == 2
    assert "is running" in capfd.readouterr().err
    first.terminate()
    first.wait(LIMIT_S)


@pytest.mark.dist
def test_ranks_meet_under_the_agent(layout: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(layout, "generate=ranks") == 0, (layout.attempt("generate", 1) / "agent.log").read_text()
    assert read_json(layout.done("generate")) == {"world": 2, "threads": "1"}
    assert main(["logs", "mine", "--stage", "generate"]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == [
        "[generate#1 rank 0] rank 0 of 2",
        "[generate#1 rank 1] rank 1 of 2",
    ]


@pytest.mark.dist
@pytest.mark.fault
@pytest.mark.parametrize("victim", ["supervisor", "agent", "cancel"])
def test_no_rank_is_orphaned(layout: RunLayout, victim: str) -> None:
    (layout.root / "hang").touch()
    supervisor = start(layout, "generate=ranks")
    folder = layout.stage("generate")
    until(lambda: len(list(folder.glob("pid-*"))) == 2, layout)
    ranks = {int(path.read_text()) for path in folder.glob("pid-*")}
    assert ranks < set(process.tagged(STAGE_TAG, str(layout.root)))
    if victim == "supervisor":
        supervisor.kill()
    elif victim == "agent":
        os.kill(_parent(ranks.pop()), signal.SIGKILL)
    else:
        LocalBackend().cancel(layout)
    supervisor.wait(LIMIT_S)
    until(lambda: no_process_left(layout), layout)
    expected = {"supervisor": "running", "agent": "failed", "cancel": "cancelled"}
    assert words(layout)[0] == expected[victim]


@pytest.mark.dist
@pytest.mark.fault
def test_submit_returns_at_once_and_runs_detached(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_recipe(home / "r.yaml"))
    command = [sys.executable, "-m", "launcher", "submit", path, "--run", str(home / "real")]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
    layout = RunLayout(home / "real")
    assert read_status(layout).words in ("running", "waiting")
    assert main(["cancel", "real"]) == 0
    assert no_process_left(layout)
    assert read_status(layout).words == "cancelled"


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
