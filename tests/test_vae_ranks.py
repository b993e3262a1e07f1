"""Gaussian VAEs through real processes: nothing depends on the number of ranks, or on being interrupted."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import extract_codes, measuring, sample, train_prior, train_tokenizer
from tests.boards import charts_shown, empty_charts
from tests.ranks import run_ranks
from tests.recipes import tiny_recipe, tiny_tree
from tests.test_vae import SIDE, vae
from tests.training_helpers import (
    State,
    clock_run,
    many_streams,
    stage_of,
    tokenizer_experiment,
    whole_stage,
)
from vqscale.config.inputs import check_levels
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.data import clocks
from vqscale.data.manifest import read_manifest
from vqscale.data.shards import open_shards
from vqscale.errors import UserError
from vqscale.exporting import export_run
from vqscale.loading import load_prior, load_tokenizer
from vqscale.training.distributed import Ranks, process_group

pytestmark = pytest.mark.dist

STEPS, HALF = 10, 4
LOSSES = ("total", "bits_per_dim", "kl_top", "kl_bottom")


def recipe(**settings: Any) -> Recipe:
    training = {"steps": STEPS, "learning_rate": 2e-3, "global_batch": 24, "checkpoint_every": HALF, "keep": 9}
    training |= {"validate_every": STEPS, "picture_every": STEPS, "log_every": 1}
    own = vae(training=training, **settings)
    return tiny_recipe(**{key: value for key, value in many_streams().items() if "tokenizer" not in key}, **own)


RECIPES = {
    "elbo": recipe(kl_warmup=3, free_bits=0.6, ema_decay=0.5, samples=2),
    "iwae": recipe(objective="iwae", samples=3, likelihood={"kind": "mixture", "components": 2}),
}
"""With all that lives beside the network: averaged weights, and the divergences that free bits go by."""


@dataclass
class Training:
    """What a training left behind on one rank."""

    curves: dict[str, list[float]] = field(default_factory=dict)
    """On rank 0."""
    state: State = field(default_factory=dict)
    beside: State = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


def train(run: Path, folder: Path, weights: int = 0) -> dict[str, Training]:
    """All recipes, one after the other; each goes on from what it finds in the folder."""
    with process_group("cpu", 60) as ranks:
        return {name: train_one(ranks, run, name, folder / name, weights) for name in RECIPES}


def train_one(ranks: Ranks, run: Path, name: str, folder: Path, weights: int) -> Training:
    made, found = tokenizer_experiment(ranks, run, RECIPES[name], weights), Training()
    found.validation = made.run(folder)
    found.state = made.state()
    found.beside = {key: value.numpy().copy() for key, value in made.task.extra_state().items()}
    found.beside |= {piece.name: piece.local.numpy().copy() for piece in made.task.pieces()}
    if ranks.first:
        found.curves = {key: made.recorder.curve(f"loss/{key}") for key in LOSSES}
    return found


@dataclass
class Trained:
    """One and two ranks that were left alone, and two that go on from the half-way of two, with other first weights."""

    one: dict[str, Training]
    two: list[dict[str, Training]]
    resumed: dict[str, Training]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("vaes")
    run = clock_run(root / "run", **many_streams())
    (one,) = run_ranks(1, train, run, root / "one")
    two = run_ranks(2, train, run, root / "two")
    for name in RECIPES:
        half = f"{name}/step-{HALF:08d}"
        shutil.copytree(root / "two" / half, root / "resumed" / half)
    return Trained(one, two, run_ranks(2, train, run, root / "resumed", 99)[0])


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", RECIPES)
def test_a_vae_does_not_depend_on_the_ranks(trained: Trained, name: str) -> None:
    alone, first = trained.one[name], trained.two[0][name]
    for key in LOSSES:
        np.testing.assert_allclose(first.curves[key], alone.curves[key], rtol=1e-3)
    # Adam takes steps of full size along gradients that are rounding alone; so young a decoder's means show it.
    assert first.validation == pytest.approx(alone.validation, rel=5e-2)
    assert alone.curves["bits_per_dim"][-1] < alone.curves["bits_per_dim"][0]


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_hold_the_same_and_a_resumed_vae_is_bit_identical(trained: Trained, name: str) -> None:
    first, second = (each[name] for each in trained.two)
    assert equal(first.state, second.state)
    assert equal(first.beside, second.beside)
    assert first.validation == second.validation
    assert trained.resumed[name].curves["total"] == first.curves["total"][HALF:]
    assert equal(trained.resumed[name].state, first.state)
    assert equal(trained.resumed[name].beside, first.beside)
    assert trained.resumed[name].validation == first.validation


def all_stages(run: Path) -> dict[str, Any]:
    with process_group("cpu", 60) as ranks:
        figures = {"tokenizer": train_tokenizer.main(stage_of("tokenizer", run, ranks))}
        figures["extract"] = whole_stage(extract_codes, stage_of("extract", run, ranks))
        figures["prior"] = train_prior.main(stage_of("prior", run, ranks))
        whole_stage(sample, stage_of("sample", run, ranks))
        return figures | {"measured": measuring.measure(stage_of("evaluate", run, ranks))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run whose stages two ranks went through."""
    training = tiny_tree(tokenizer__training__log_every=2)["tokenizer"]["training"]
    run = clock_run(tmp_path_factory.mktemp("stages") / "run", **vae(training=training))
    found, other = run_ranks(2, all_stages, run)
    assert found["measured"] == other["measured"]
    return run, found


def test_it_goes_through_all_stages_on_two_ranks(finished: tuple[Path, dict[str, Any]]) -> None:
    """The tokenizer's own bound, the prior's and the evaluation's are one."""
    run, found = finished
    measured, tokenizer = found["measured"], found["tokenizer"]
    assert measured["pixel_likelihood"] == "gaussian"
    # Two draws of the same posteriors: one of each image's own noise, one of its posterior's.
    assert measured["bits_per_dim"] == pytest.approx(tokenizer["bits_per_dim"], rel=0.01)
    assert measured["bits_per_dim_normal"] == pytest.approx(measured["bits_per_dim"], rel=1e-6), "it is the prior"
    assert measured["bits_per_sample"] == pytest.approx(found["prior"]["bits_per_sample"], rel=0.1)
    for name in ("bottom", "top"):
        assert measured[f"kl_{name}"] == pytest.approx(tokenizer[f"kl_{name}"], rel=1e-4)
        assert 0 <= measured[f"active_{name}"] <= 1
    assert measured["psnr"] == pytest.approx(tokenizer["psnr"], rel=1e-2)
    assert not [key for key in {**measured, **found["extract"]} if "code" in key and key != "codes_likelihood"]
    levels = read_manifest(RunLayout(run).codes("train")).levels
    assert [str(level) for level in levels] == ["bottom 4×4 of 3 channels", "top 2×2 of 2 channels"]
    assert list(charts_shown(run, "prior")) == ["tokenizer", "prior"], "a prior without weights has no speed"
    assert not empty_charts(run, "tokenizer", "prior")


def test_estimates_and_surgery_do_not_depend_on_the_ranks(finished: tuple[Path, dict[str, Any]]) -> None:
    run, found = finished
    two, alone = found["measured"], measuring.measure(stage_of("evaluate", run))
    assert alone.keys() == two.keys()
    for name, value in alone.items():
        assert two[name] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value), name
    assert (two["bits_per_dim_is"], two["bits_per_dim_best_is"]) == ("ELBO", "IWAE-4 bound")
    assert (two["estimate_images"], two["estimate_draws"]) == (5, 8)
    # On the same draws, by Jensen's inequality; the next two are means over others.
    assert two["estimate_elbo"] >= two["estimate_iwae"] >= two["estimate_importance_sampling"]
    assert two["estimate_elbo"] == pytest.approx(two["bits_per_dim"], rel=0.1)
    assert two["estimate_naive"] == pytest.approx(two["bits_per_dim"], rel=0.2), "after 8 steps latents say little"
    assert 1 <= two["estimate_importance_sampling_effective"] <= 8
    gain = two["estimate_elbo"] - two["estimate_iwae"]
    assert two["bits_per_dim_best"] == pytest.approx(two["bits_per_dim"] - gain)
    assert two["bits_per_dim_best_error"] >= two["bits_per_dim_error"] > two["estimate_iwae_gain_error"] > 0
    dimensions = 3 * SIDE**2
    assert two["latent_bits_rate"] == pytest.approx(two["bits_per_dim_latents"] * dimensions, rel=1e-4)
    parts = two["latent_bits_mutual_information_given_class"] + two["latent_bits_kl_prior"]
    assert parts == pytest.approx(two["latent_bits_rate"])
    plain = two["latent_bits_mutual_information"] + two["latent_bits_kl_normal"]
    assert plain == pytest.approx(two["latent_bits_rate"], abs=1e-4), "N(0, 1) is the prior"
    assert two["latent_bits_mutual_information"] <= two["latent_bits_most_information"] == math.log2(16)
    assert two["units"] == 4 * 4 * 3 + 2 * 2 * 2
    assert two["units_active"] <= two["units"]
    for what in ("reconstructions", "samples"):
        assert two[f"sharpness_gradient_energy_{what}"] > 0
        assert two[f"sharpness_high_frequencies_{what}"] > 0


def test_it_is_exported_with_its_prior(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = finished
    export_run(RunLayout(run), tmp_path / "exported")
    tokenizer, again = load_tokenizer(run), load_tokenizer(tmp_path / "exported")
    images, _ = clocks.draw(0, 3, SIDE, 0)
    encoded = again.encode(images)
    assert {name: array.dtype for name, array in encoded.items()} == {"bottom": np.float32, "top": np.float32}
    np.testing.assert_array_equal(
        again.decode(again.centres(encoded)), tokenizer.decode(tokenizer.centres(tokenizer.encode(images)))
    )
    assert [grid.channels for grid in load_prior(tmp_path / "exported").grids] == [2, 3]
    assert "with a prior over the latents (normal)" in (tmp_path / "exported" / "README.md").read_text().lower()


def test_commands_that_need_codes_say_so(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.codes import main as codes
    from pipelines.draw import main as draw

    run, _ = finished
    assert codes(["show", str(run / "codes"), "--tokenizer", str(run), "--out", str(tmp_path / "sheet.png")]) == 0
    assert "level top: 2×2 of 2 channels" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()
    assert draw([str(run), "--details-of", "x.png", "--out", str(tmp_path / "drawn")]) == 2
    assert "a tokenizer of kind vae has continuous latents" in capsys.readouterr().err
    assert draw([str(run), "--count", "2", "--out", str(tmp_path / "drawn")]) == 0


def test_a_prior_of_codes_does_not_read_posteriors(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    shards = open_shards(str(run / "codes" / "train"))
    with pytest.raises(
        UserError, match=r"holds bottom 4×4 of 3 channels, .*, but the recipe has bottom 4×4 of 16 codes"
    ):
        check_levels(tiny_recipe(), shards)
