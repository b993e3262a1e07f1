"""Priors of every kind through real processes: nothing may depend on the number of ranks, or on being interrupted."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks
from tests.recipes import tiny_recipe
from tests.test_pixels import pixels
from tests.test_vae import vae
from tests.training_helpers import State, code_shards, many_streams, prior_experiment
from vqscale.config.recipe import Recipe
from vqscale.training.distributed import Ranks, process_group

pytestmark = pytest.mark.dist

STEPS, HALF = 20, 8
LOSSES = ("total", "top", "bottom")
SIZES = {"layers": 1, "width": 16, "heads": 2}


def recipe(networks: list[dict[str, Any]], **overrides: Any) -> Recipe:
    training = {"steps": STEPS, "learning_rate": 3e-3, "checkpoint_every": HALF, "keep": 9}
    settings = {f"prior__training__{key}": value for key, value in training.items()}
    return tiny_recipe(
        **many_streams(**settings, prior__class_dropout=0.3, prior__networks=networks) | overrides,
    )


def over_latents(networks: list[dict[str, Any]]) -> Recipe:
    """The same over the continuous latents of a Gaussian VAE."""
    own = vae()["tokenizer"]
    return recipe(networks, tokenizer=own | {"training": own["training"] | {"global_batch": 24}})


def over_pixels(networks: list[dict[str, Any]]) -> Recipe:
    """The same over the grey levels of small images."""
    own = {key: value for key, value in pixels("grey").items() if key in ("data__image_size", "tokenizer")}
    own["tokenizer"] = own["tokenizer"] | {"training": own["tokenizer"]["training"] | {"global_batch": 24}}
    return recipe(networks, **own)


RECIPES = {
    "transformer": recipe([SIZES]),
    "pixelcnn": recipe([{"kind": "pixelcnn", "layers": 2, "width": 16}]),
    "recurrent": recipe([{"kind": "recurrent", "layers": 2, "width": 16}]),
    "masked": recipe([SIZES, {"kind": "masked", **SIZES}]),
    "blockwise": recipe([SIZES, {"kind": "blockwise", **SIZES}]),
    "uniform": recipe([{"kind": "uniform"}]),
    "dropout-and-muon": recipe([{**SIZES, "dropout": 0.2}], prior__training__optimizer="muon"),
    "dequantized": over_pixels([{"kind": "dequantized", "couplings": 4, "width": 8, "noise_couplings": 2}]),
    "normal": over_latents([{"kind": "normal"}]),
    "realnvp": over_latents([{"kind": "realnvp", "couplings": 5, "width": 16}]),
    "maf": over_latents([{"kind": "maf", "maps": 2, "layers": 1, "width": 16}]),
    "iaf": over_latents([{"kind": "iaf", "maps": 2, "layers": 1, "width": 16}]),
    "aggregated": over_latents([{"kind": "aggregated", "images": 50}]),
}
"""Dropout's masks follow from seed, step and rank alone; Muon is a second optimizer to be saved."""
WITHOUT_WEIGHTS = ("uniform", "normal", "aggregated")
LEARNING = tuple(name for name in RECIPES if name not in WITHOUT_WEIGHTS)
EQUAL_ON_ANY_RANKS = tuple(name for name in LEARNING if name != "dropout-and-muon")


@dataclass
class Training:
    """What a training left behind on one rank."""

    curves: dict[str, list[float]] = field(default_factory=dict)
    """On rank 0."""
    state: State = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


def train(root: Path, folder: Path, weights: int = 0) -> dict[str, Training]:
    """All recipes, one after the other; each goes on from what it finds in the folder."""
    with process_group("cpu", 60) as ranks:
        return {name: train_one(ranks, root, name, folder / name, weights) for name in RECIPES}


def train_one(ranks: Ranks, root: Path, name: str, folder: Path, weights: int) -> Training:
    codes = root / RECIPES[name].tokenizer.kind
    made, found = prior_experiment(ranks, codes, RECIPES[name], weights), Training()
    found.validation = made.run(folder)
    found.state = made.state()
    if ranks.first:
        lines = made.recorder.lines.values()
        found.curves = {key: [line[f"loss/{key}"] for line in lines if f"loss/{key}" in line] for key in LOSSES}
    return found


@dataclass
class Trained:
    """One and two ranks that were left alone, and two that go on from the half-way of two, with other first weights."""

    one: dict[str, Training]
    two: list[dict[str, Training]]
    resumed: dict[str, Training]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("priors")
    for name in ("transformer", "dequantized", "normal"):
        code_shards(root / RECIPES[name].tokenizer.kind, recipe=RECIPES[name])
    (one,) = run_ranks(1, train, root, root / "one", timeout=280)
    two = run_ranks(2, train, root, root / "two", timeout=280)
    half = f"step-{HALF:08d}"
    for name in LEARNING:
        shutil.copytree(root / "two" / name / half, root / "resumed" / name / half)
    return Trained(one, two, run_ranks(2, train, root, root / "resumed", 99, timeout=280)[0])


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", EQUAL_ON_ANY_RANKS)
def test_a_prior_does_not_depend_on_the_ranks(trained: Trained, name: str) -> None:
    alone, first = trained.one[name], trained.two[0][name]
    for level in LOSSES:
        np.testing.assert_allclose(first.curves[level], alone.curves[level], rtol=1e-4)
    assert first.validation == pytest.approx(alone.validation, rel=1e-4)
    assert alone.curves["total"][-1] < 0.95 * alone.curves["total"][0]


@pytest.mark.parametrize("name", LEARNING)
def test_ranks_hold_the_same_and_a_resumed_prior_is_bit_identical(trained: Trained, name: str) -> None:
    first, second = (each[name] for each in trained.two)
    assert equal(first.state, second.state)
    assert trained.resumed[name].curves["total"] == first.curves["total"][HALF:]
    assert equal(trained.resumed[name].state, first.state)


def test_dropout_acts(trained: Trained) -> None:
    assert not equal(trained.one["dropout-and-muon"].state, trained.one["transformer"].state)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_without_weights_there_are_figures_and_no_steps(trained: Trained, name: str) -> None:
    one, two, resumed = trained.one[name], trained.two[1][name], trained.resumed[name]
    for made in (one, two, resumed):
        assert not any(made.curves.values())
        assert made.validation == pytest.approx(one.validation, rel=1e-6)
        assert equal(made.state, one.state)
    assert bool(one.state) == (name == "aggregated"), "the images that it keeps"
    if name == "uniform":
        assert one.validation["nats_per_code"] == pytest.approx(math.log(16))


def test_priors_that_know_the_latents_are_better_than_the_normal(trained: Trained) -> None:
    nats = {name: trained.one[name].validation["nats_per_value"] for name in ("normal", "realnvp", "maf", "aggregated")}
    assert max(nats["realnvp"], nats["maf"], nats["aggregated"]) < nats["normal"]
