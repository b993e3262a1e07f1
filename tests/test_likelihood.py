"""Likelihoods: probabilities that add up, known cases, and figures that follow from each image alone."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import get_args

import numpy as np
import pytest
import torch

from vqscale.evaluation.bits import LevelCodes, prior_figures, standard_error, uniform_figures
from vqscale.evaluation.pixel_fit import PixelLikelihood, fit_pixels
from vqscale.models.pixel_distributions import Family, log_probability

FAMILIES: tuple[Family, ...] = get_args(Family)
LEVELS = torch.arange(256, dtype=torch.float64)


def cumulative(family: Family, x: float) -> float:
    return 1 / (1 + math.exp(-x)) if family == "logistic" else NormalDist().cdf(x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [0.01, 0.7, 5.0, 80.0, 1e4])
def test_the_256_probabilities_add_up_to_one(family: Family, scale: float) -> None:
    means = torch.tensor([[0.0], [0.3], [101.4999], [127.5], [255.0]], dtype=torch.float64)
    found = log_probability(family, LEVELS, means, torch.tensor(scale, dtype=torch.float64))
    assert torch.isfinite(found).all(), "no grey level is impossible"
    assert torch.allclose(found.exp().sum(1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bin_holds_what_the_distribution_has_there(family: Family) -> None:
    for value, mean, scale in (
        (100, 103.2, 4.0),
        (0, 3.0, 2.0),
        (255, 250.0, 6.0),
        (40, 90.0, 11.0),
        (200, 90.0, 30.0),
    ):
        low = 0.0 if value == 0 else cumulative(family, (value - 0.5 - mean) / scale)
        high = 1.0 if value == 255 else cumulative(family, (value + 0.5 - mean) / scale)
        numbers = (torch.tensor(float(n), dtype=torch.float64) for n in (value, mean, scale))
        assert log_probability(family, *numbers).exp().item() == pytest.approx(high - low, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_far_away_it_is_finite_and_falls(family: Family) -> None:
    mean, scale = (torch.tensor(n, dtype=torch.float64) for n in (3.0, 0.05))
    found = log_probability(family, LEVELS[4:255], mean, scale)
    assert torch.isfinite(found).all()
    assert (found.diff() < 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_finds_the_scale_that_made_the_pixels(family: Family) -> None:
    """Of three colours, each with its own; and no other scale is likelier for the pixels that it saw."""
    rng = np.random.default_rng(0)
    means = rng.uniform(60, 190, (256, 16, 16, 3))
    true = np.array([2.0, 5.0, 9.0])
    noise = rng.logistic(size=means.shape) if family == "logistic" else rng.normal(size=means.shape)
    images = np.clip(np.round(means + true * noise), 0, 255).astype(np.uint8)
    fitted = fit_pixels(family, images, means)
    assert np.array(fitted.scale) == pytest.approx(true, rel=0.02)
    assert fit_pixels(family, images, means) == fitted

    def cost(factor: float) -> float:
        return float(PixelLikelihood(family, tuple(factor * s for s in fitted.scale)).nats(images, means).sum())

    assert cost(1.0) < min(cost(0.97), cost(1.03))


def test_nats_of_known_images() -> None:
    """A distribution that is flat over the grey levels costs log 256 a value; a perfect one costs nothing."""
    images = np.random.default_rng(0).integers(1, 255, (3, 4, 4, 3), dtype=np.uint8)
    sharp = PixelLikelihood("logistic", (1e-3,) * 3).nats(images, images.astype(np.float32))
    assert sharp == pytest.approx(0, abs=1e-9)
    middle = np.full(images.shape, 127.5)
    broad = PixelLikelihood("gaussian", (60.0,) * 3).nats(images, middle)
    by_hand = [
        -sum(
            math.log(NormalDist(127.5, 60).cdf(v + 0.5) - NormalDist(127.5, 60).cdf(v - 0.5))
            for v in image.ravel().tolist()
        )
        for image in images
    ]
    assert broad == pytest.approx(by_hand, rel=1e-9)


def test_an_image_counts_the_same_in_any_batch() -> None:
    rng = np.random.default_rng(1)
    images, means = rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8), rng.uniform(0, 255, (9, 8, 8, 3))
    likelihood = PixelLikelihood("logistic", (3.0, 4.0, 5.0))
    alone = np.concatenate([likelihood.nats(images[i : i + 1], means[i : i + 1]) for i in range(9)])
    assert likelihood.nats(images, means) == pytest.approx(alone, rel=1e-12)


def test_figures_of_a_uniform_prior_are_the_baseline() -> None:
    codes = {"bottom": LevelCodes(64, 512), "top": LevelCodes(16, 256)}
    pixels = np.array([100.0, 120.0, 140.0])
    nats = {name: np.full(3, level.length * math.log(level.size)) for name, level in codes.items()}
    baseline, found = uniform_figures(pixels, codes, 48), prior_figures(pixels, nats, codes, 48)
    assert baseline["nats_per_code_top_uniform"] == found["nats_per_code_top"] == pytest.approx(math.log(256))
    assert baseline["bits_per_dim_pixels"] == pytest.approx(120 / math.log(2) / 48)
    assert baseline["bits_per_dim_codes_uniform"] == pytest.approx((64 * 9 + 16 * 8) / 48)
    assert found["bits_per_sample"] == pytest.approx(64 * 9 + 16 * 8)
    assert found["bits_per_dim_codes"] == pytest.approx((64 * 9 + 16 * 8) / 48)
    assert found["bits_per_dim"] == pytest.approx(baseline["bits_per_dim_uniform"])
    assert found["bits_per_dim"] == pytest.approx(baseline["bits_per_dim_pixels"] + found["bits_per_dim_codes"])
    assert found["bits_per_dim_error"] == pytest.approx(20 / math.sqrt(3) / math.log(2) / 48)
    half = prior_figures(pixels, {name: value / 2 for name, value in nats.items()}, codes, 48)
    assert half["nats_per_code"] == pytest.approx(found["nats_per_code"] / 2)
    assert math.isnan(standard_error([1.0]))
