"""A profile that leaves too little time to save is warned of before a run starts, once saves were measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli import main
from launcher.plan import make_plan
from launcher.rundir import create
from tests.recipes import write_recipe
from vqscale.config.layout import RunLayout
from vqscale.events import EventLog


def saved(run: Path, stage: str, stall_s: float, write_s: float) -> RunLayout:
    """A run with two saves of a stage, the last of which took so long."""
    path = write_recipe(run.with_suffix(".yaml"))
    layout = create(make_plan(str(path), run=run))
    log = EventLog(layout.events(stage), stage, 1, "images/s", 9)
    log.note("checkpoint", 4, stall_s=99.0, write_s=99.0)
    log.note("checkpoint", 8, stall_s=stall_s, write_s=write_s)
    log.log(9)
    log.close()
    return layout


@pytest.mark.parametrize(("write_s", "warned"), [(14.0, False), (15.0, True)])
def test_half_of_the_grace_is_for_a_save(
    home: Path, write_s: float, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(home / "tiny-1", "prior", 1.0, write_s)  # the local profile's grace is 30 s
    made = make_plan(str(home / "tiny-1.yaml"))
    told = [line for line in made.warnings if "save" in line]
    assert bool(told) == warned
    if warned:
        assert told == [
            "the last save of prior in tiny-1 took 16.0 s, more than half of grace_s (30 s): a preempted stage may not "
            "save; raise it"
        ]


def test_only_runs_of_this_recipe_and_profile_count(home: Path) -> None:
    saved(home / "tiny-1", "tokenizer", 0, 60)
    assert not [line for line in make_plan(str(home / "tiny-1.yaml"), "devslurm").warnings if "save" in line]
    assert not [
        line for line in make_plan(str(home / "tiny-1.yaml"), overrides=["name=other"]).warnings if "save" in line
    ]
    saved(home / "tiny-2", "tokenizer", 0, 1)
    assert not [line for line in make_plan(str(home / "tiny-1.yaml")).warnings if "save" in line], "the newest one says"


def test_runs_in_directories_of_any_name_count(home: Path) -> None:
    saved(home / "mine", "tokenizer", 0, 60)
    broken = saved(home / "newer", "tokenizer", 0, 1)
    broken.info.write_text("{")
    (warning,) = [line for line in make_plan(str(home / "mine.yaml")).warnings if "save" in line]
    assert "the last save of tokenizer in mine took 60.0 s" in warning


def test_going_on_warns_too(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layout = saved(home / "tiny-1", "tokenizer", 5, 60)
    monkeypatch.setattr("launcher.backends.local.LocalBackend.submit", lambda *rest: None)
    assert main(["requeue", str(layout.root)]) == 0
    assert "the last save of tokenizer in tiny-1 took 65.0 s" in capsys.readouterr().err
