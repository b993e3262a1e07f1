"""What a drill repeats, and what it refuses before it has run anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.backends import backend_for
from launcher.cli import main
from launcher.drill import Drill, shortened
from launcher.job import job_of
from launcher.plan import make_plan
from launcher.recipes import find_recipe, recipe_names
from launcher.rundir import create
from tests.recipes import write_recipe
from vqscale.config.layout import RunLayout
from vqscale.config.load import load_recipe
from vqscale.errors import UserError


def made(home: Path, on: str = "local", **overrides: Any) -> RunLayout:
    """A run whose images, shards and codes are there, as empty folders."""
    layout = create(make_plan(str(write_recipe(home / "r.yaml", **overrides)), on, run=home / "mine"))
    for folder in (layout.images("train"), layout.root / "shards", layout.codes("train")):
        folder.mkdir(parents=True)
    return layout


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_can_be_shortened(name: str, stage: str) -> None:
    """Also those with steps that count from the first on, such as the continuous ones of the quickstart."""
    path = find_recipe(name)
    whole = load_recipe(path)
    for overrides in ([], [f"{stage}.training.steps=8"]):
        short = load_recipe(path, shortened(whole, stage, overrides))
        training = getattr(short, stage).training
        assert training.steps == (8 if overrides else min(24, getattr(whole, stage).training.steps))
        assert (training.checkpoint_every, training.log_every) == (max(1, training.steps // 4), 1)
        assert training.warmup <= training.steps // 4


def test_what_the_user_sets_counts(home: Path) -> None:
    recipe = made(home).read_recipe()
    told = shortened(recipe, "tokenizer", ["tokenizer.training.checkpoint_every=3", "resources.strategy=fsdp2"])
    assert told.index("tokenizer.training.checkpoint_every=3") > told.index("tokenizer.training.checkpoint_every=2")
    assert "resources.strategy=fsdp2" in told


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stage", "x"], "--stage: 'x' cannot be drilled; stages: tokenizer, extract, prior"),
        (["--faults", "bogus"], "--faults: unknown action 'bogus'"),
        (["--faults", "kill:rank=0"], "--faults: 'kill:rank=0' has no step"),
        (["--random", "0"], "--random: 0 kills"),
        (["--stage", "extract"], "--stage extract: has no steps for faults; use --random N"),
        (["tokenizer.training.steps=many"], "'tokenizer.training.steps' is 'many'"),
        (["resources.stages.tokenizer.processes=3"], "is not divisible by"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    layout = made(home)
    assert main(["drill", "mine", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (layout.root / "drill").exists()


def test_a_run_of_a_cluster_is_drilled_on_this_machine(home: Path) -> None:
    """With checkpoints of its own; those of the run's tokenizer are read where they are."""
    place = home / "elsewhere"
    layout = made(home, on="devslurm", resources__checkpoints=str(place))
    tokenizer = Path(layout.checkpoints(layout.read_recipe(), "tokenizer"))
    tokenizer.mkdir(parents=True)
    recipe = load_recipe(layout.recipe, shortened(layout.read_recipe(), "prior", ["resources.checkpoints=/mine"]))
    assert recipe.resources.checkpoints == ""
    Drill(layout, recipe, "prior")
    repetition = RunLayout(layout.root / "drill" / "prior" / "undisturbed")
    assert job_of(repetition, ("prior",)).profile.name == "local"
    assert (
        "torch.distributed.run"
        in backend_for(job_of(repetition, ("prior",)).profile).render(job_of(repetition, ("prior",)))[0].shell()
    )
    assert (repetition.root / "checkpoints" / "tokenizer").resolve() == tokenizer
    assert (repetition.root / "codes").resolve() == layout.root / "codes"


def test_a_tokenizer_in_an_object_store_cannot_be_borrowed(home: Path) -> None:
    layout = made(home, resources__checkpoints="s3://key:secret@bucket/all")
    recipe = layout.read_recipe()
    with pytest.raises(UserError, match="reads the tokenizer, which no link can lead to") as caught:
        Drill(layout, load_recipe(layout.recipe, shortened(recipe, "extract", [])), "extract")
    assert "secret" not in str(caught.value)
    Drill(layout, load_recipe(layout.recipe, shortened(recipe, "tokenizer", [])), "tokenizer")
