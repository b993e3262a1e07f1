"""A run goes on elsewhere: another profile, other resources, the same experiment."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
import yaml

from launcher import process
from launcher.backends.base import Poll
from launcher.backends.local import LocalBackend
from launcher.backends.slurm import SlurmBackend
from launcher.cli import main
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState
from tests.recipes import write_recipe
from vqscale.config.layout import RunLayout
from vqscale.files import read_json, write_json


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which backend was asked to submit."""
    asked: list[str] = []

    def note(self: object, layout: RunLayout) -> Poll:
        asked.append(type(self).__name__)
        return Poll(True, "x")

    for backend in (LocalBackend, SlurmBackend):
        monkeypatch.setattr(backend, "submit", note)
    return asked


@pytest.fixture
def layout(home: Path) -> RunLayout:
    """A run of two processes whose training was preempted."""
    path = write_recipe(home / "r.yaml", resources__processes=2)
    made = create(make_plan(str(path), run=home / "mine", stages="generate,pack,tokenizer"))
    state = RunState.read(made)
    for stage in ("generate", "pack"):
        state.begin(stage, 1)
        state.end(stage, "done")
        write_json(made.done(stage), {})
    state.begin("tokenizer", 1)
    state.end("tokenizer", "preempted", "saved at step 4")
    state.write(made)
    return made


def test_a_run_goes_on_elsewhere(
    layout: RunLayout, submitted: list[str], idle_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["requeue", "mine", "--on", "devslurm", "resources.processes=1", "resources.timeout_s=60"]) == 0
    assert submitted == ["SlurmBackend"]
    assert "mine goes on with tokenizer" in capsys.readouterr().out
    recipe, info = layout.read_recipe(), read_json(layout.info)
    assert (recipe.resources.processes, recipe.resources.timeout_s) == (1, 60)
    assert info["profile"]["name"] == "devslurm"
    entry = RunState.read(layout).stages["tokenizer"]
    assert (entry.state, entry.attempt, entry.past[0].message) == ("waiting", 1, "saved at step 4")
    assert main(["requeue", "mine", "--on", "local"]) == 0
    assert submitted == ["SlurmBackend", "LocalBackend"]
    assert main(["show", "mine"]) == 0
    page = capsys.readouterr().out
    assert "to devslurm resources.processes=1 resources.timeout_s=60" in page
    assert "profile      local" in page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tokenizer.training.steps=9"], "tokenizer.training.steps: is a part of the experiment"),
        (["seed=2"], "only resources.* can change"),
        (["resources.checkpoints=/elsewhere"], "resources.checkpoints: cannot change in a run that has begun"),
        (["resources.stages.extract.array=2"], "resources.stages.extract.array: cannot change in a run that has begun"),
        (["resources.stages.extract={array: 2}"], "resources.stages.extract.array: cannot change"),
        (["resources.stages={extract: {array: 2}}"], "resources.stages.extract.array: cannot change"),
        (["resources.proceses=2"], "did you mean"),
        (["resources.processes=5"], "data.streams 2 is not divisible by resources.processes 5"),
        (["--on", "nowhere"], "no profile 'nowhere'"),
    ],
)
def test_what_cannot_be_changes_nothing(
    layout: RunLayout, submitted: list[str], capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    before = [path.read_bytes() for path in (layout.recipe, layout.info, layout.state)]
    assert main(["requeue", "mine", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert [path.read_bytes() for path in (layout.recipe, layout.info, layout.state)] == before
    assert submitted == []


def test_nothing_is_left_behind_in_the_cluster(layout: RunLayout, submitted: list[str], home: Path) -> None:
    """A cluster that does not answer may still run the stage: the run stays there."""
    profile = {"name": "kube", "backend": "kubernetes", "container": {"image": "x"}}
    profile["kubernetes"] = {"cpus_per_node": 1, "volumes": [{"claim": "a", "path": str(home)}]}
    (home / "kube.yaml").write_text(yaml.safe_dump(profile))
    info = read_json(layout.info)
    write_json(layout.info, {**info, "profile": profile})
    assert main(["requeue", "mine", "--on", "local"]) == 2, "nothing says where the cluster is"
    assert read_json(layout.info)["profile"]["name"] == "kube"


def test_a_stage_that_is_added_keeps_its_array(home: Path, submitted: list[str]) -> None:
    """Else each of its jobs would take all of the work for its own."""
    resources = {"processes": 1, "threads": 1, "device": "cpu", "stages": {"extract": {"array": 4}}}
    path = write_recipe(home / "r.yaml", resources=resources)
    layout = create(make_plan(str(path), run=home / "mine", stages="generate,pack,tokenizer"))
    for stage in ("generate", "pack", "tokenizer"):
        write_json(layout.done(stage), {})
    assert main(["requeue", "mine", "--stages", "extract", "resources.stages.extract.processes=2"]) == 0
    assert RunState.read(layout).stages["extract"].tasks == 4
    assert submitted == ["LocalBackend"]


@pytest.fixture
def left(layout: RunLayout) -> dict[str, object]:
    """The supervisor of the run was in a pod that has another name now."""
    identity = {**process.identity(1), "host": "launcher-pod-7f9c"}
    write_json(layout.supervisor, identity)
    state = RunState.read(layout)
    state.begin("tokenizer", 2)
    state.write(layout)
    return identity


@pytest.mark.parametrize("words", [[], ["--on", "devslurm", "resources.processes=1"]])
def test_a_run_is_taken_over_from_a_machine_that_is_gone(
    layout: RunLayout,
    left: dict[str, object],
    submitted: list[str],
    idle_slurm: None,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    assert main(["requeue", "mine", *words]) == 2
    assert "cannot be asked from here; requeue it there, or if that machine is gone for good" in capsys.readouterr().err
    assert main(["cancel", "mine"]) == 2
    assert "vqscale requeue --take-over first" in capsys.readouterr().err
    assert main(["requeue", "mine", "--take-over", *words]) == 0
    said = capsys.readouterr()
    assert "warning: launcher-pod-7f9c could not be asked whether supervisor 1 or what it started" in said.err
    assert "mine goes on with tokenizer" in said.out
    assert submitted == ["SlurmBackend" if words else "LocalBackend"]
    assert not layout.supervisor.exists(), "the next one writes its own"
    assert RunState.read(layout).stages["tokenizer"].state == "waiting"


def test_a_run_is_not_taken_over_from_the_living(
    layout: RunLayout, left: dict[str, object], submitted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does anything change where the run could not go on."""
    with (layout.root / "supervisor.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["requeue", "mine", "--take-over"]) == 2
    assert "another supervisor works on this run" in capsys.readouterr().err
    assert main(["requeue", "mine", "--take-over", "resources.processes=5"]) == 2
    assert capsys.readouterr().err.startswith("error: resources.processes=5: ")
    assert (read_json(layout.supervisor), submitted) == (left, [])
