"""Many runs at a glance: tables, filters, the page of a run, what Slurm's reasons mean, one question for all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import process, registry, watch
from launcher.backends import slurm_queue
from launcher.backends.slurm_queue import Row
from launcher.backends.slurm_words import explain
from launcher.cli import main
from launcher.listing import Choice
from launcher.state import RunState
from launcher.status import read_status
from tests.processor import in_imports
from tests.test_launcher_runs import new_run
from vqscale.config.layout import RunLayout
from vqscale.events import EventLog
from vqscale.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]


def begin(layout: RunLayout, stage: str, attempt: int = 1, end: str | None = None, message: str = "") -> None:
    state = RunState.read(layout)
    state.begin(stage, attempt)
    if end:
        state.end(stage, end, message)  # type: ignore[arg-type]
    state.write(layout)


def copies(first: RunLayout, number: int) -> list[RunLayout]:
    """Further runs, each made a second after the one before."""
    made = []
    for index in range(number):
        layout = RunLayout(first.root.parent / f"run-{index:03d}")
        shutil.copytree(first.root, layout.root)
        info = read_json(first.info)
        info |= {"id": layout.root.name, "created": info["created"] + 1 + index}
        write_json(layout.info, info)
        registry.claim(info["id"], layout.root, info["created"])
        made.append(layout)
    return made


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(list(words)) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_several_runs_are_a_line_each(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = new_run(home, "first")
    second, third = copies(first, 2)
    begin(second, "tokenizer", 3, end="failed", message="boom")
    events = EventLog(second.events("tokenizer"), "tokenizer", 3, "images/s", 1000)
    events.log(500, rate=1234.0, loss=0.125)
    second.quarantine("tokenizer").write_text('{"kind": "corrupt"}\n{"kind": "label"}\n')
    (second.root / "checkpoints/tokenizer/step-00000400").mkdir(parents=True)
    lines = said(capsys, "status").splitlines()
    assert lines[0].split() == ["run", "stage", "state", "step", "rate", "loss", "ETA", "saved", "at", "bad"]
    row = next(line for line in lines if line.startswith("run-000 "))
    for text in ("tokenizer #3", "failed", "500/1000", "1,234 images/s", "0.125", "400 (", " s ago)"):
        assert text in row
    assert row.split()[-1] == "2"
    assert "run-000: tokenizer: boom" in lines
    facts = json.loads(said(capsys, "status", "first", third.root.name, "--json"))
    assert [one["id"] for one in facts] == ["first", "run-001"]
    assert [line.split()[0] for line in said(capsys, "status", "-n", "1").splitlines()[1:]] == ["run-001", "run-001:"]
    assert main(["status", "--watch", "first", "run-000"]) == 1, "as with `submit --follow`"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "first: waiting, prepared only: vqscale requeue first starts it",
        "run-000: failed",
    ]
    assert main(["status", "--watch", "run-000"]) == 1
    assert "\nrun-000: failed; vqscale logs run-000 --failed says why" in capsys.readouterr().out
    for stage in RunState.read(third).stages:
        begin(third, stage, end="done")
        write_json(third.done(stage), {})
    for words in (["run-001"], ["run-001", "run-001"]):
        assert main(["status", "--watch", *words]) == 0
    capsys.readouterr()


def test_a_live_table_follows_all_runs_to_their_end(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = new_run(home, "first")
    (second,) = copies(first, 1)
    write_json(second.supervisor, process.identity(os.getpid()))  # somebody runs it
    begin(second, "generate")

    def end(seconds: float) -> None:
        begin(second, "generate", end="failed", message="boom")
        second.supervisor.unlink()

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=end, monotonic=time.monotonic))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["status", "--watch"]) == 0
    printed = capsys.readouterr().out
    assert 0 < printed.index("running") < printed.index("failed")
    assert printed.endswith("run-000: failed\n")
    assert "first" not in printed, "it was over before"
    assert said(capsys, "status", "--watch").startswith("no run is going on")


def test_the_newest_checkpoint(home: Path) -> None:
    layout = new_run(home, "mine")
    events = EventLog(layout.events("tokenizer"), "tokenizer", 1, "images/s", 10)
    events.note("checkpoint", 3, committed=True)
    for step in range(1000):  # more than is read at first
        events.log(step, rate=1.0, loss=0.1)
    events.note("checkpoint", 7, committed=False)
    events.log(8, rate=1.0, loss=0.2)

    def saved() -> int | None:
        stage = next(stage for stage in read_status(layout).stages if stage.stage == "tokenizer")
        return stage.saved.step if stage.saved else None

    assert saved() == 3, "the last try failed"
    events.note("checkpoint", 9, committed=True)
    assert saved() == 9
    with layout.events("tokenizer").open("a") as file:
        file.write('{"time": 1, "event": "checkpoint", "st{"time": 2, "event": "checkpoint", "step": 10}\n')
    assert saved() == 9, "a line that a kill has torn is passed over"
    (layout.root / "checkpoints/tokenizer/step-00000005").mkdir(parents=True)
    assert saved() == 5, "the folder knows better"


def test_filters(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = new_run(home, "first")
    for index, layout in enumerate(copies(first, 4)):
        if index % 2:
            begin(layout, "tokenizer", end="failed")
        if index == 2:
            info = read_json(layout.info)
            write_json(layout.info, {**info, "profile": {**info["profile"], "name": "other"}})
    old = registry.entries()[0]
    registry.claim(old.id, old.path, time.time() - 3 * 86_400)

    def ids(*words: str) -> list[str]:
        return [row["id"] for row in json.loads(said(capsys, "ls", "--json", *words))]

    assert ids() == ["first", "run-000", "run-001", "run-002", "run-003"]
    assert ids("--state", "failed,done") == ["run-001", "run-003"]
    assert ids("--state", "failed", "-n", "1") == ["run-003"]
    assert ids("--name", "*-00[12]") == ["run-001", "run-002"]
    assert ids("--since", "2d") == ["run-000", "run-001", "run-002", "run-003"]
    assert ids("--since", "2020-01-31", "-n", "2") == ["run-002", "run-003"]
    assert ids("--on", "other") == ["run-002"]
    shutil.rmtree(first.root)
    (home / "run-000" / "state.json").write_text("[]")
    (home / "run-001" / "run.json").write_text("{")
    assert ids("--state", "gone") == ["first"]
    assert ids("--state", "unreadable") == ["run-000", "run-001"]
    lines = said(capsys, "status").splitlines()
    assert [line.split()[1] for line in lines if line.startswith("run-00")][:2] == ["unreadable", "unreadable"]
    assert f"run-000: {home}/run-000/state.json: holds no state of a run" in lines
    assert lines[-1] == "gone: 1 more; vqscale ls --state gone lists them, vqscale ls --prune forgets them"
    assert said(capsys, "ls", "--prune", "--name", "run-*") == "nothing is gone\n"
    assert said(capsys, "ls", "--prune") == f"forgotten: first  {home}/first\n"
    assert ids() == ["run-000", "run-001", "run-002", "run-003"]
    assert said(capsys, "ls", "--name", "none") == "no run fits; vqscale ls shows all\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("ls", "--state", "runing"), "did you mean 'running'?"),
        (("ls", "--since", "soon"), "write 30m, 12h, 2d, 1w"),
        (("ls", "-n", "0"), "choose 1 or more"),
        (("status", "mine", "--state", "failed"), "leave RUN or the filters out"),
        (("status", "mine", "mien"), "near: mine"),
        (("show", "mien"), "near: mine"),
        (("status", "mine", "--watch", "--json"), "--watch and --json exclude each other; leave one out"),
        (("requeue", "mine", "--follow", "--json"), "--follow and --json exclude each other; leave one out"),
        (("logs", "mine", "--attempt", "0"), "--attempt: no attempt 0; they are counted from 1"),
        (("logs", "mine", "--attempt", "5"), "mine: no stage has begun; leave --attempt out"),
    ],
)
def test_wrong_words_are_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    new_run(home, "mine")
    error = said(capsys, *words, code=2)
    assert expected in error
    assert error.count("\n") == 1


def test_the_page_of_a_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = new_run(home, "mine")
    begin(layout, "generate", 1)
    begin(layout, "generate", 2, end="preempted", message="preempted, saved at step 7")
    state = RunState.read(layout)
    state.reopen(layout)  # vqscale requeue
    state.write(layout)
    begin(layout, "generate", 3, end="failed", message="boom")
    (layout.root / "checkpoints/tokenizer/step-00000400").mkdir(parents=True)
    write_json(layout.report, {"psnr": 24.5})
    page = said(capsys, "show", "mine")
    for text in (
        f"recipe       {home / 'r.yaml'}",
        "lost: who watched over it was killed",
        "preempted after 0 s: preempted, saved at step 7",
        "failed after 0 s: boom",
        f"tokenizer: steps 400 in {layout.root}/checkpoints/tokenizer",
        "report       psnr 24.5",
        f"tensorboard  tensorboard --logdir {layout.tensorboard}",
        "torch 2.",
    ):
        assert text in page
    facts = json.loads(said(capsys, "show", "mine", "--json"))
    attempts = facts["attempts"]["generate"]
    assert [(one["attempt"], one["state"]) for one in attempts] == [(1, "running"), (2, "preempted"), (3, "failed")]
    assert attempts[1]["logs"] == str(layout.attempt("generate", 2))
    assert facts["checkpoints"]["prior"] == {"where": str(layout.root / "checkpoints/prior"), "steps": []}


def test_overrides_are_recorded(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_run(home, "warm")  # writes r.yaml
    assert main(["submit", str(home / "r.yaml"), "--prepare-only", "--run", str(home / "mine"), "seed=7"]) == 0
    capsys.readouterr()
    assert json.loads(said(capsys, "show", "mine", "--json"))["overrides"] == ["seed=7"]
    assert f"recipe       {home / 'r.yaml'} seed=7" in said(capsys, "show", "mine")


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("PENDING", "Resources", "waits for free nodes (Resources)"),
        ("PENDING", "(Priority)", "waits behind jobs of higher priority (Priority)"),
        ("PENDING", "None", "has not been looked at yet (PENDING)"),
        ("PENDING", "DependencyNeverSatisfied", "can never start: the stage before failed"),
        ("PENDING", "JobHeldUser", "is held by its user (JobHeldUser): scontrol release 7"),
        ("PENDING", "launch_failed_requeued_held", "a node could not start it"),
        ("PENDING", "launch failed requeued held", ": scontrol release 7"),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:node1", "waits for nodes that are down, drained or reserved"),
        ("PENDING", "QOSMaxGRESPerUser", "waits for a limit of your account"),
        ("PENDING", "AssocGrpCPUMinutesLimit", "waits for a limit of your account"),
        ("PENDING", "SomethingNew", "waits (SomethingNew)"),
        ("RUNNING", "None", "runs (RUNNING)"),
        ("REQUEUE_HOLD", "None", ": scontrol release 7"),
        ("SIGNALING", "None", "is signaling (SIGNALING)"),
    ],
)
def test_reasons_of_slurm_in_plain_words(state: str, reason: str, expected: str) -> None:
    assert expected in explain(Row(state, "name", reason), "7")


@pytest.fixture
def fake_slurm(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A squeue that counts how often it is asked and knows jobs 0 to 99."""
    programs = home / "bin"
    programs.mkdir()
    asked = home / "asked"
    lines = "".join(f"{n}|PENDING|vqscale-run-{n:03d}-generate|JobHeldUser|/\\n" for n in range(100))
    for name in ("squeue", "sacct"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {asked}\nprintf '{lines}'\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    slurm_queue._forget()
    return asked


def test_one_question_for_a_hundred_jobs(home: Path, fake_slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = new_run(home, "first")
    info = read_json(first.info)
    slurm = {"name": "big", "backend": "slurm", "slurm": {"cpus_per_task": 1}}
    write_json(first.info, {**info, "profile": slurm})
    for number, layout in enumerate(copies(first, 100)):
        write_json(layout.slurm, {"jobs": {"generate": str(number)}, "cancelled": False})
    printed = said(capsys, "ls", "--on", "big", "--state", "waiting")
    held = "(Slurm job 7 (generate) is held by its user (JobHeldUser): scontrol release 7)"
    assert held in next(line for line in printed.splitlines() if line.startswith("run-007 "))
    Choice().rows("current")
    assert fake_slurm.read_text().split() == ["squeue"], "for all of them, and for the next seconds"


def test_two_hundred_runs_in_a_second(home: Path) -> None:
    first = new_run(home, "first")
    begin(first, "tokenizer", end="failed")
    events = EventLog(first.events("tokenizer"), "tokenizer", 1, "images/s", 1000)
    for step in range(500):
        events.log(step, rate=100.0, loss=0.5, data_wait=0.1)
    copies(first, 200)

    for word in ("status", "ls"):
        command = [sys.executable, "-m", "launcher", word]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.count("run-") >= 200
        assert in_imports([command] * 2) < 6.5, word
