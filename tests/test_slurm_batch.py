"""The batch host and the backend, with stand-ins for Slurm's commands: what they decide and say. Needs no Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher import batch
from launcher.logs import LogChoice, print_logs
from launcher.plan import make_plan
from launcher.retry import Limits
from launcher.rundir import create
from launcher.state import RunState, StageState
from tests.ranks import LIMIT_S
from tests.recipes import write_recipe
from tests.slurm_stand_ins import stand_in
from tests.waiting import until
from vqscale.config.layout import RunLayout
from vqscale.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]

SAVES = """
import os, signal, sys, time
from pathlib import Path
from vqscale.config.layout import RunLayout
from vqscale.files import write_json
layout, act = RunLayout(Path(sys.argv[1])), sys.argv[2]
if act.startswith("wait"):
    got = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, frame: got.append(number))
    (layout.root / "listening").touch()
    while not got:
        time.sleep(0.02)
step = int(act.removeprefix("wait"))
attempt = int(os.environ["VQSCALE_ATTEMPT"])
assert os.environ["PET_LOG_DIR"] == str(layout.attempt("generate", attempt) / "ranks")
write_json(layout.preempted("generate"), {"attempt": attempt, "step": step})
sys.exit(1)
"""


@pytest.fixture
def layout(home: Path, fakes: Path) -> RunLayout:
    recipe = write_recipe(home / "r.yaml", resources={"processes": 2, "device": "cpu"})
    return create(make_plan(str(recipe), "devslurm", run=home / "mine", stages="generate,pack"))


def start(
    layout: RunLayout, *command: str, job: str = "7", requeues: int = 2, **surroundings: str
) -> subprocess.Popen[bytes]:
    number = surroundings.get("SLURM_ARRAY_JOB_ID", job)
    write_json(layout.slurm, {"cancelled": False, **(read_json(layout.slurm) or {}), "jobs": {"generate": number}})
    own = ("--run", str(layout.root), "--stage", "generate", "--requeues", str(requeues), "--grace", "5")
    own += ("--retries", "2", "--pause", "7")
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.batch", *own, "--", *command],
        cwd=ROOT,
        env={**os.environ, "SLURM_JOB_ID": job, **surroundings},
        stdout=subprocess.DEVNULL,
    )


def fake(layout: RunLayout, act: str) -> tuple[str, ...]:
    """A stage of `tests.fake_stages`."""
    return (
        sys.executable,
        "-m",
        "tests.fake_stages.play",
        "--run",
        str(layout.root),
        "--stage",
        "generate",
        "--act",
        act,
    )


def saves(layout: RunLayout, act: str) -> tuple[str, ...]:
    """A stage that says it has saved at a step, at once or when it is asked (`wait7`)."""
    return (sys.executable, "-c", SAVES, str(layout.root), act)


def entry(layout: RunLayout) -> StageState:
    return RunState.read(layout).stages["generate"]


def test_the_marker_decides(layout: RunLayout) -> None:
    assert start(layout, *fake(layout, "done")).wait(LIMIT_S) == 0
    assert (entry(layout).state, entry(layout).attempt) == ("done", 1)
    assert RunState.read(layout).stages["pack"].state == "waiting", "the next stage is another job's"
    assert (layout.attempt("generate", 1) / "agent.log").exists()


def test_a_fault_of_the_users_is_not_requeued(layout: RunLayout, fakes: Path) -> None:
    assert start(layout, *fake(layout, "fail")).wait(LIMIT_S) == 1
    assert (entry(layout).state, entry(layout).message) == ("failed", "the dog ate the shards")
    assert not (fakes / "asked").exists()


def test_a_preempted_stage_is_requeued_while_it_gets_on(layout: RunLayout, fakes: Path) -> None:
    for step, expected in [
        ("5", "preempted, saved at step 5; requeued (1 of 2)"),
        ("5", "preempted, saved at step 5; not requeued: no progress since the last time"),
        ("6", "preempted, saved at step 6; requeued (2 of 2)"),
        ("9", "preempted, saved at step 9; not requeued: the profile's limit of 2 is reached"),
    ]:
        assert start(layout, *saves(layout, step)).wait(LIMIT_S) == 1
        assert (entry(layout).state, entry(layout).message) == ("preempted", expected)
    assert (fakes / "asked").read_text() == "requeue 7\n" * 2
    record = read_json(layout.requeues("generate"))
    assert (record["job"], [one["step"] for one in record["tries"]]) == ("7", [5, 6])
    start(layout, *saves(layout, "9"), job="8").wait(LIMIT_S)
    assert entry(layout).message.endswith("requeued (1 of 2)"), "a new job has its own count"


NODES = """case "$*" in *hostnames*) echo node1; echo node2;; *) echo "$@" >> "$(dirname "$0")/asked";; esac"""
JOB = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_PARTITION": "main"}


def on_nodes(fakes: Path, *states: str) -> None:
    """The job has node1 and node2; `sinfo` gives these states to node1, node2, ..."""
    stand_in(fakes, "scontrol", NODES)
    rows = "".join(f"node{number} {state}\n" for number, state in enumerate(states, 1))
    stand_in(fakes, "sinfo", f"cat <<'END'\n{rows}END")


def failing(layout: RunLayout, **failure: object) -> tuple[str, ...]:
    """A stage that leaves this in `failure.json`."""
    words = (
        "import json, sys; from pathlib import Path; from vqscale.config.layout import RunLayout; "
        "from vqscale.files import write_json; "
        "write_json(RunLayout(Path(sys.argv[1])).failure('generate'), json.loads(sys.argv[2])); sys.exit(1)"
    )
    return (sys.executable, "-c", words, str(layout.root), json.dumps({"message": "it broke", **failure}))


def test_a_hang_is_tried_elsewhere_with_longer_and_longer_pauses(layout: RunLayout, fakes: Path) -> None:
    on_nodes(fakes, "alloc", "alloc", "idle", "idle", "idle")
    for suspect, expected in [
        ("node2", "hang: it broke; requeued (1 of 9), without node2, after 7 s"),
        ("node1", "hang: it broke; requeued (2 of 9), without node1, after 14 s"),
        ("node1", "hang: it broke; not requeued: failed 3 times in a row without progress"),
    ]:
        command = failing(layout, kind="hang", suspects=[suspect])
        assert start(layout, *command, requeues=9, **JOB).wait(LIMIT_S) == 1
        assert entry(layout).message == expected
    assert (fakes / "asked").read_text().splitlines() == [
        "requeue 7",
        "update JobId=7 StartTime=now+7 ExcNodeList=node2",
        "requeue 7",
        "update JobId=7 StartTime=now+14 ExcNodeList=node2,node1",
    ]
    assert entry(layout).state == "failed"
    tries = read_json(layout.requeues("generate"))["tries"]
    assert [(one["kind"], one["excluded"], one["pause_s"]) for one in tries] == [
        ("hang", ["node2"], 7),
        ("hang", ["node1"], 14),
    ]


def test_a_node_that_does_not_answer_is_left_out(layout: RunLayout, fakes: Path) -> None:
    """Ranks that lost each other cannot tell whose fault it was; the scheduler can."""
    on_nodes(fakes, "alloc", "alloc*", "idle", "idle")
    assert start(layout, *failing(layout, kind="network"), **JOB).wait(LIMIT_S) == 1
    assert entry(layout).message == (
        "node: node2 does not answer; it broke; requeued (1 of 2), without node2, after 7 s"
    )
    assert entry(layout).state == "waiting"


def test_a_network_that_failed_blames_nobody(layout: RunLayout, fakes: Path) -> None:
    on_nodes(fakes, "alloc", "alloc", "idle", "idle")
    assert start(layout, *failing(layout, kind="network"), **JOB).wait(LIMIT_S) == 1
    assert entry(layout).message == "network: it broke; requeued (1 of 2), after 7 s"


def test_no_node_is_left_out_that_is_needed(layout: RunLayout, fakes: Path) -> None:
    on_nodes(fakes, "alloc", "alloc", "down*")
    assert start(layout, *failing(layout, kind="hang", suspects=["node2"]), **JOB).wait(LIMIT_S) == 1
    assert entry(layout).message == "hang: it broke; requeued (1 of 2), after 7 s"


def test_a_scheduler_that_does_not_answer_is_nobodys_fault(layout: RunLayout, fakes: Path) -> None:
    stand_in(fakes, "sinfo", "exit 1")
    stand_in(fakes, "scontrol", 'case "$*" in show*) exit 1;; *) echo "$@" >> "$(dirname "$0")/asked";; esac')
    assert start(layout, *failing(layout, kind="hang", suspects=["node2"]), **JOB).wait(LIMIT_S) == 1
    assert entry(layout).message == "hang: it broke; requeued (1 of 2), after 7 s"
    assert start(layout, *fake(layout, "done"), **JOB).wait(LIMIT_S) == 0


@pytest.mark.parametrize("kind", ["user", "diverged"])
def test_what_would_fail_again_is_not_tried_again(layout: RunLayout, fakes: Path, kind: str) -> None:
    on_nodes(fakes, "alloc", "alloc*", "idle")
    assert start(layout, *failing(layout, kind=kind), **JOB).wait(LIMIT_S) == 1
    assert (entry(layout).state, entry(layout).message) == ("failed", "it broke")
    assert not (fakes / "asked").exists()


def test_something_unknown_is_tried_again_once(layout: RunLayout, fakes: Path) -> None:
    on_nodes(fakes, "alloc", "alloc", "idle")
    for expected in (
        "unknown: it broke; requeued (1 of 2), after 7 s",
        "unknown: it broke; not requeued: failed 2 times in a row without progress",
    ):
        start(layout, *failing(layout, kind="error"), **JOB).wait(LIMIT_S)
        assert entry(layout).message == expected


def test_a_task_of_an_array_goes_back_by_its_own_number(layout: RunLayout, fakes: Path) -> None:
    on_nodes(fakes, "alloc", "alloc", "idle")
    array = {**JOB, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    command = (sys.executable, "-c", "import os; assert os.environ['VQSCALE_TASK'] == '3'; os.kill(os.getpid(), 9)")
    start(layout, *command, job="12", **array).wait(LIMIT_S)
    assert (fakes / "asked").read_text() == "requeue 7_3\nupdate JobId=7_3 StartTime=now+7 ExcNodeList=\n"
    assert RunState.read(layout).stages["generate"].state == "waiting"
    own = RunState.read(layout.of_task(3)).stages["generate"]
    assert own.message.startswith("unknown: its processes left no marker and their agent was killed by signal 9")
    assert (layout.of_task(3).attempt("generate", 1) / "nodes.json").exists()


def test_a_start_that_was_lost_with_its_host_is_put_down_and_limited(layout: RunLayout, fakes: Path) -> None:
    """Slurm starts such a job again by itself; who was there before could not say anything."""
    on_nodes(fakes, "down*", "idle", "idle")
    for number in (1, 2, 3):
        state = RunState.read(layout)
        state.begin("generate", number)
        state.write(layout)
        write_json(layout.attempt("generate", number) / "nodes.json", ["node1", "node2"])
        again = {**JOB, "SLURM_RESTART_COUNT": str(number)}
        start(layout, sys.executable, "-c", "import os; os.kill(os.getppid(), 9)", requeues=9, **again).wait(LIMIT_S)
    tries = read_json(layout.requeues("generate"))["tries"]
    assert [(one["kind"], one["message"]) for one in tries] == [
        ("node", "node1 does not answer; started again by Slurm")
    ] * 3
    assert entry(layout).message == (
        "node: node1 does not answer; not started again: failed 3 times in a row without progress"
    )


@pytest.mark.parametrize("word", ["preempted", "failed"])
def test_a_start_that_slurm_ended_for_a_lost_node_is_put_down_too(layout: RunLayout, fakes: Path, word: str) -> None:
    """Its batch host lives and is sent TERM, as for a requeue by hand, which is nobody's fault."""
    for node2, expected in (("idle", []), ("down*", ["node2 does not answer; started again by Slurm"])):
        on_nodes(fakes, "idle", node2)
        state = RunState.read(layout)
        state.begin("generate", 1)
        state.end("generate", word, "not saved")  # type: ignore[arg-type]
        state.write(layout)
        write_json(layout.attempt("generate", 1) / "nodes.json", ["node1", "node2"])
        start(layout, *fake(layout, "done"), **{**JOB, "SLURM_RESTART_COUNT": "1"}).wait(LIMIT_S)
        layout.done("generate").unlink()
        tries = (read_json(layout.requeues("generate")) or {"tries": []})["tries"]
        assert [one["message"] for one in tries] == expected


def test_a_job_that_slurm_is_ending_decides_nothing(layout: RunLayout, fakes: Path) -> None:
    """TERM comes to all of the job while Slurm is asked: whoever asks is ended, and the job as well."""
    on_nodes(fakes, "alloc", "alloc", "idle")
    stand_in(fakes, "sinfo", "kill -TERM $PPID; kill -TERM $$")
    assert start(layout, *failing(layout, kind="network"), **JOB).wait(LIMIT_S) == 1
    assert (entry(layout).state, entry(layout).message) == ("failed", "it broke")
    assert not (fakes / "asked").exists()
    assert not layout.requeues("generate").exists()


def test_the_request_goes_on_to_the_stage(layout: RunLayout, fakes: Path) -> None:
    batch = start(layout, *saves(layout, "wait7"))
    until((layout.root / "listening").exists, layout)
    batch.send_signal(signal.SIGUSR2)
    assert batch.wait(LIMIT_S) == 1
    assert entry(layout).message == "preempted, saved at step 7; requeued (1 of 2)"


@pytest.mark.parametrize("cancelled", [True, False])
def test_the_end_by_slurm_is_no_cancellation(layout: RunLayout, fakes: Path, cancelled: bool) -> None:
    write_json(layout.slurm, {"jobs": {"generate": "7"}, "cancelled": cancelled})
    batch = start(layout, *saves(layout, "wait7"))
    until((layout.root / "listening").exists, layout)
    batch.terminate()
    assert batch.wait(LIMIT_S) == 1
    word = "cancelled" if cancelled else "preempted"
    assert (entry(layout).state, entry(layout).message) == (word, f"{word}, saved at step 7")
    assert not (fakes / "asked").exists(), "Slurm is ending the job, and requeues by itself what it preempts"


def test_a_users_fault_is_not_requeued_even_when_asked_to_stop(layout: RunLayout, fakes: Path) -> None:
    words = "import sys; exec(sys.argv[3])"
    plant = (
        "from vqscale.files import write_json; from vqscale.config.layout import RunLayout; from pathlib import Path; "
        "write_json(RunLayout(Path(sys.argv[1])).failure('generate'), {'kind': 'user', 'message': 'no such shard'})"
    )
    hang = f"import signal, time; signal.signal(signal.SIGUSR2, lambda *a: sys.exit(1)); {plant}; time.sleep(600)"
    batch = start(layout, sys.executable, "-c", words, str(layout.root), "x", hang)
    until(layout.failure("generate").exists, layout)
    batch.send_signal(signal.SIGUSR2)
    assert batch.wait(LIMIT_S) == 1
    assert (entry(layout).state, entry(layout).message) == ("failed", "no such shard")
    assert not (fakes / "asked").exists()


def test_a_refused_requeue_is_said(layout: RunLayout, fakes: Path) -> None:
    stand_in(fakes, "scontrol", "echo 'Requeue is disabled for the job' >&2; exit 1")
    assert start(layout, *saves(layout, "5")).wait(LIMIT_S) == 1
    assert entry(layout).message == "preempted, saved at step 5; not requeued: Requeue is disabled for the job"


def test_outside_of_a_job_it_says_so(layout: RunLayout) -> None:
    command = [sys.executable, "-m", "launcher.batch", "--run", str(layout.root), "--stage", "generate"]
    done = subprocess.run(
        [*command, "--requeues", "1", "--grace", "1", "--retries", "1", "--pause", "1", "--", "true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "runs inside a job of Slurm" in done.stderr


def test_a_job_that_is_not_recorded_does_nothing(
    layout: RunLayout, fakes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = batch.Batch(layout, "generate", fake(layout, "done"), "7", Limits(2, 2, 7), 5)
    monkeypatch.setattr(batch, "_RECORD_S", 0.0)
    before = layout.state.read_bytes()
    for known, named in (({}, "none"), ({"generate": "8", "pack": "7"}, "8")):
        write_json(layout.slurm, {"jobs": known, "cancelled": False})
        assert job.run() == 1
        assert f"generate: job 7 does nothing: slurm.json names {named} for this stage" in capfd.readouterr().out
    assert layout.state.read_bytes() == before
    assert not layout.attempt("generate", 1).exists()


def test_a_job_waits_for_a_record_that_its_host_cannot_see_yet(
    layout: RunLayout, fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        write_json(layout.slurm, {"jobs": {"generate": "7"}, "cancelled": False})

    monkeypatch.setattr(batch, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    job = batch.Batch(layout, "generate", fake(layout, "done"), "7", Limits(2, 2, 7), 5)
    assert job._is_the_runs()


def test_logs_are_by_the_rank_in_the_whole_job(layout: RunLayout) -> None:
    state = RunState.read(layout)
    state.begin("generate", 1)
    state.end("generate", "failed")
    state.write(layout)
    for node, rank in (("12-0_a", "1"), ("12-0_b", "0")):  # each node's agent counts its own processes from 0
        folder = layout.attempt("generate", 1) / "ranks" / node / "attempt_0/0"
        folder.mkdir(parents=True)
        (folder / "rank").write_text(rank)
        (folder / "stdout.log").write_text(f"I am {rank}\n")
    printed: list[Any] = []
    print_logs(layout, LogChoice(), follow=False, say=lambda line: printed.append(line.plain()))
    assert printed == ["[generate#1 rank 0] I am 0", "[generate#1 rank 1] I am 1"]
