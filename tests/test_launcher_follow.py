"""quickstart and submit --follow over fake stages: the end, failure, Ctrl-C."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from launcher import recipes
from launcher.backends.base import STAGE_TAG, Poll
from launcher.backends.local import LocalBackend
from launcher.cli import main
from launcher.commands import start
from launcher.process import end_tagged, identity
from launcher.status import RunStatus, Saved, StageStatus, read_status
from launcher.tables import view
from launcher.watch import follow
from launcher.wording import what_next
from tests.recipes import write_recipe
from tests.waiting import until
from vqscale.config.layout import RunLayout
from vqscale.files import write_json

ROOT = Path(__file__).resolve().parents[1]


class FakeStages(LocalBackend):
    """The local backend with a supervisor whose stages act as told."""

    def __init__(self, *acts: str) -> None:
        super().__init__()
        self._acts = acts

    def submit(self, layout: RunLayout) -> Poll:
        write_json(layout.report, {"hour_accuracy": 0.5, "seconds": {"prior": 1.5}})
        command = [sys.executable, "-m", "tests.fake_stages.supervisor", str(layout.root), *self._acts]
        supervisor = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        write_json(layout.supervisor, identity(supervisor.pid))
        return self.poll(layout)


@pytest.fixture
def acts(home: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    write_recipe(home / "quickstart.yaml")
    monkeypatch.setattr(recipes, "RECIPES", home)
    monkeypatch.setattr(start.signal, "signal", lambda number, handler: None)

    def set_acts(*acts: str) -> None:
        monkeypatch.setattr(start, "backend_for", lambda profile: FakeStages(*acts))

    return set_acts


def interrupt_when_running(layout: RunLayout) -> None:
    until(lambda: read_status(layout).stages[0].state == "running", layout)
    raise KeyboardInterrupt


def test_quickstart_prints_the_report(home: Path, acts, capsys: pytest.CaptureFixture[str]) -> None:
    acts()
    assert main(["quickstart", "--run", str(home / "quick"), "seed=2"]) == 0
    printed = capsys.readouterr().out
    for text in ("generate   done", "evaluate   done", "hour_accuracy", "tensorboard --logdir"):
        assert text in printed


def test_quickstart_that_fails_says_why(home: Path, acts, capsys: pytest.CaptureFixture[str]) -> None:
    acts("pack=fail")
    assert main(["quickstart", "--run", str(home / "quick")]) == 1
    assert "error: pack: the dog ate the shards; see vqscale logs quick --failed" in capsys.readouterr().err


@pytest.mark.fault
def test_interrupted_quickstart_is_cancelled(home: Path, acts, monkeypatch: pytest.MonkeyPatch) -> None:
    acts("generate=hang")
    monkeypatch.setattr(start, "follow", interrupt_when_running)
    assert main(["quickstart", "--run", str(home / "quick")]) == 130
    assert read_status(RunLayout(home / "quick")).words == "cancelled"


@pytest.mark.fault
def test_interrupted_follow_detaches(
    home: Path, acts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    acts("generate=hang")
    monkeypatch.setattr(start, "follow", interrupt_when_running)
    layout = RunLayout(home / "quick")
    try:
        assert main(["submit", "quickstart", "--run", str(layout.root), "--follow"]) == 0
        assert "quick goes on; vqscale status quick --watch shows it" in capsys.readouterr().out
        assert read_status(layout).words == "running"
    finally:
        FakeStages().cancel(layout)
        end_tagged(STAGE_TAG, str(layout.root), grace_s=0)


def test_live_table_on_a_terminal(home: Path, acts, capsys: pytest.CaptureFixture[str]) -> None:
    acts()
    assert main(["submit", "quickstart", "--run", str(home / "quick"), "--stages", "generate"]) == 0
    capsys.readouterr()

    class Terminal:
        def isatty(self) -> bool:
            return True

    assert follow(RunLayout(home / "quick"), Terminal()).state == "done"  # type: ignore[arg-type]
    assert "100 images/s" in capsys.readouterr().out


@pytest.mark.parametrize(("width", "age", "bars"), [(80, "", 0), (120, " (2 d ago)", 2)])
def test_no_figure_is_cut_by_the_terminal(width: int, age: str, bars: int) -> None:
    saved = Saved(25_000, time.time() - 2 * 86_400)
    stage = StageStatus("tokenizer", "running", 2, 3_725.0, "", 25_200, 90_000, 0.01785, 3_095.0, "images/s", 9_000.0)
    stages = (stage, replace(stage, state="done", attempt=1, eta_s=None, saved=saved))
    status = RunStatus("mine", Path("mine"), 0.0, "local", "running", True, "", stages, "tokenizer")
    terminal = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with terminal.capture() as shown:
        terminal.print(view(status))
    running, done = shown.get().splitlines()[2:]
    for figure in ("running #2", "25200/90000", "0.01785", "3,095 images/s", "1:02:05"):
        assert f"{figure} " in running
    assert running.rstrip().endswith("2:30:00")
    assert done.rstrip().endswith(f" 25000{age}")
    assert sum("━━━" in line for line in (running, done)) == bars


def test_what_can_be_done_with_a_run() -> None:
    stages = tuple(StageStatus(name, "done", 1, 1.0, "") for name in ("extract", "prior"))
    status = RunStatus("mine", Path("mine"), 0.0, "local", "done", False, "", stages, "prior")
    assert "vqscale sample mine --out DIR" in what_next(status)
    assert what_next(replace(status, stages=stages[:1])) == "vqscale show mine is its page"
    assert what_next(replace(status, state="failed")).startswith(
        "vqscale logs mine --failed says why, vqscale requeue "
    )
    assert what_next(replace(status, state="preempted")) == "vqscale requeue mine goes on from where it stopped"
    assert "vqscale cancel mine" in what_next(replace(status, state="running", alive=True))
    assert not what_next(replace(status, note="its processes are gone: vqscale requeue mine"))
