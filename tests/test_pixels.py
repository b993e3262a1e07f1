"""The tokenizer of kind `pixels`: nothing is lost, and a prior's likelihood is that of the images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import extract_codes, measuring, sample, train_prior, train_tokenizer
from tests.boards import charts_shown, empty_charts
from tests.ranks import run_ranks
from tests.recipes import tiny_recipe
from tests.training_helpers import clock_run, stage_of, whole_stage
from vqscale.config.layout import RunLayout
from vqscale.config.load import parse
from vqscale.config.recipe import Recipe
from vqscale.data import clocks
from vqscale.errors import UserError
from vqscale.exporting import export_run
from vqscale.loading import load_prior, load_tokenizer
from vqscale.models.pixels import from_uint8, to_uint8
from vqscale.models.raw_pixels import RawPixels
from vqscale.training.distributed import process_group

SIDE = 8
TRAINING = {"steps": 3, "global_batch": 8, "learning_rate": 1e-3}


def pixels(channels: str = "rgb", **overrides: Any) -> dict[str, Any]:
    """Overrides of the tiny recipe."""
    return {
        "data__image_size": SIDE,
        "tokenizer": {"kind": "pixels", "channels": channels, "training": TRAINING},
        "prior__networks": [{"kind": "pixelcnn", "layers": 1, "width": 8}],
        "prior__training__steps": 8,
        "prior__training__learning_rate": 2e-2,
        "prior__training__log_every": 2,
        "sample__per_class": 1,
    } | overrides


def noise(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)


def test_every_image_comes_back() -> None:
    images = np.concatenate([noise(), np.arange(256, dtype=np.uint8).repeat(3).reshape(4, SIDE, SIDE, 3)])
    network, pixels = RawPixels(), from_uint8(images, torch.device("cpu"))
    blue, green, red = network.encode(pixels)
    for channel, values in enumerate((red, green, blue)):
        np.testing.assert_array_equal(values.numpy(), images[..., channel])
    np.testing.assert_array_equal(to_uint8(network.decode([blue, green, red])), images)
    assert network.log_likelihood(pixels, [blue, green, red]).tolist() == [0.0] * len(images)


def test_grey_is_the_luminance_of_pillow() -> None:
    images, network = noise(), RawPixels(grey=True)
    (grey,) = network.encode(from_uint8(images, torch.device("cpu")))
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
    np.testing.assert_array_equal(grey.numpy(), expected)
    again = network.encode(network.decode([grey]))[0]
    np.testing.assert_array_equal(again.numpy(), expected)


def test_the_prior_meets_red_first() -> None:
    recipe = tiny_recipe(**pixels())
    assert [str(level) for level in recipe.levels] == [f"{name} 8×8 of 256 codes" for name in ("blue", "green", "red")]
    assert recipe.dimensions == 3 * SIDE**2
    assert tiny_recipe(**pixels("grey")).dimensions == SIDE**2


def test_settings_of_other_kinds_are_refused() -> None:
    tree = tiny_recipe(**pixels()).model_dump(mode="json")
    tree["tokenizer"]["hidden"] = 3
    with pytest.raises(UserError, match=r"unknown key 'tokenizer.hidden'.*valid keys: kind, training, channels"):
        parse(Recipe, tree, "r.yaml")
    tree["tokenizer"] = {"kind": "pixel"}
    with pytest.raises(UserError, match=r"'tokenizer.kind' is 'pixel'; use 'vqvae2', 'vae', 'pixels'"):
        parse(Recipe, tree, "r.yaml")


def all_stages(run: Path) -> dict[str, Any]:
    with process_group("cpu", 60) as ranks:
        figures = train_tokenizer.main(stage_of("tokenizer", run, ranks))
        whole_stage(extract_codes, stage_of("extract", run, ranks))
        figures |= {"prior": train_prior.main(stage_of("prior", run, ranks))}
        whole_stage(sample, stage_of("sample", run, ranks))
        return figures | {"measured": measuring.measure(stage_of("evaluate", run, ranks))}


@pytest.mark.dist
@pytest.mark.parametrize("channels", ["rgb", "grey"])
def test_it_goes_through_all_stages_on_two_ranks(channels: str, tmp_path: Path) -> None:
    run = clock_run(tmp_path / "run", **pixels(channels))
    found, other = run_ranks(2, all_stages, run)
    assert found["measured"] == other["measured"]
    assert (found["steps"], found["parameters"]) == (0, 0)
    measured, bits = found["measured"], 8.0
    assert (measured["pixel_likelihood"], measured["bits_per_dim_pixels"]) == ("exact", 0)
    assert measured["bits_per_dim_uniform"] == pytest.approx(bits)
    assert measured["bits_per_dim"] == pytest.approx(measured["nats_per_code"] / math.log(2))
    assert measured["bits_per_dim"] < bits
    assert measured["bits_per_dim_is"] == measured["bits_per_dim_best_is"] == "exact"
    if channels == "rgb":
        assert measured["mse"] == 0
    assert not charts_shown(run, "tokenizer"), "nothing is trained"
    assert not empty_charts(run, "tokenizer", "prior")
    images, _ = clocks.draw(0, 2, SIDE, 0)
    export_run(RunLayout(run), tmp_path / "exported")
    tokenizer, again = load_tokenizer(run), load_tokenizer(tmp_path / "exported")
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.decode(again.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    assert [grid.side for grid in load_prior(tmp_path / "exported").grids] == [SIDE] * len(tokenizer.levels)
