"""A run goes on elsewhere: another profile, other resources, the same experiment."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
        (["resources.stages.extract.array=2"], "cannot change in a run that has begun"),
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
