"""Likelihood of images under a tokenizer and a prior, in bits per dimension.

A decoder gives the mean of every pixel, not its distribution, so one is stated: a logistic or a normal distribution
around the mean, cut into the 256 grey levels (Salimans et al. 2017, section 2.1), with a scale for each colour. With
z_q the codes of the image, log p(x) >= log p(x | z_q) + log p(z_q), since p(x) also sums over all other codes (van den
Oord et al. 2017, section 3.3). So what is computed here are bits that suffice, an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.evaluation.metrics import Doubles
from vqscale.models.pixel_distributions import Family, log_probability

_FIT_PIXELS = 256  # of each image that the scales are fitted to
_NARROWEST, _WIDEST, _PRECISION = 1e-3, 1e3, 1e-4  # of a scale in grey levels, and of its logarithm


class LevelCodes(NamedTuple):
    """The latents of an image at one level: codes, or continuous ones."""

    length: int
    """How many numbers."""
    size: int
    """Of the codebook; 0 where they are continuous."""


@dataclass(frozen=True)
class PixelLikelihood:
    """p(x | z_q): every value of every pixel by itself, given its mean."""

    family: Family
    scale: tuple[float, ...]
    """In grey levels, one a colour: s of the logistic, sigma of the normal distribution."""

    def nats(self, images: NDArray[np.uint8], means: NDArray[np.floating[Any]]) -> Doubles:
        """-log p(x | z_q) [n] of images uint8 [n, H, W, C] with means [n, H, W, C] in grey levels, 0 to 255."""
        values, centres = (torch.from_numpy(np.asarray(array, np.float64)) for array in (images, means))
        found = -log_probability(self.family, values, centres, torch.tensor(self.scale, dtype=torch.float64))
        return found.flatten(1).sum(1).numpy()


def fit_pixels(family: Family, images: NDArray[np.uint8], means: NDArray[np.floating[Any]]) -> PixelLikelihood:
    """The likeliest scales for some images uint8 [n, H, W, C] and their means, by golden-section search.

    Of each image 256 pixels are used, drawn by its place in the array.
    """
    count, pixels, colours = len(images), math.prod(images.shape[1:3]), images.shape[3]
    picks = np.stack([np.random.default_rng(place).integers(0, pixels, _FIT_PIXELS) for place in range(count)])
    values, centres = (
        torch.from_numpy(
            np.take_along_axis(array.reshape(count, pixels, colours), picks[..., None], 1).astype(np.float64)
        )
        for array in (images, means)
    )

    def cost(log_scale: Tensor) -> Tensor:
        return -log_probability(family, values, centres, log_scale.exp()).sum((0, 1))

    edges = (torch.full((colours,), math.log(edge), dtype=torch.float64) for edge in (_NARROWEST, _WIDEST))
    return PixelLikelihood(family, tuple(_least(cost, *edges).exp().tolist()))


def _least(cost: Any, low: Tensor, high: Tensor) -> Tensor:
    """Where functions of one variable, one an element, are least: between `low` and `high`, if each has one valley."""
    ratio = (math.sqrt(5) - 1) / 2
    while float((high - low).max()) > _PRECISION:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        falls = cost(left) > cost(right)
        low, high = torch.where(falls, left, low), torch.where(falls, high, right)
    return (low + high) / 2


def uniform_figures(pixel_nats: Doubles, codes: Mapping[str, LevelCodes], dimensions: int) -> dict[str, float]:
    """Bits per dimension with a prior that knows nothing: the baseline, for which no prior is needed.

    Args:
        pixel_nats: -log p(x | z_q) [N] of each image.
        codes: level name → its codes.
        dimensions: values of an image, H·W·3.
    """
    bit = dimensions * math.log(2)
    pixels = float(pixel_nats.mean()) / bit
    bits = sum(level.length * math.log(level.size) for level in codes.values()) / bit
    return {
        "bits_per_dim_pixels": pixels,
        "bits_per_dim_codes_uniform": bits,
        "bits_per_dim_uniform": pixels + bits,
        **{f"nats_per_code_{name}_uniform": math.log(level.size) for name, level in codes.items()},
    }


def normal_figures(pixel_nats: Doubles, normal_nats: Doubles, dimensions: int) -> dict[str, float]:
    """Bits per dimension with the prior N(0, 1): the baseline of continuous latents, for which no prior is needed.

    Args:
        pixel_nats: -log p(x | z) [N] of each image.
        normal_nats: log q(z | x) - log N(z; 0, 1) [N] of each image.
        dimensions: values of an image.
    """
    bit = dimensions * math.log(2)
    pixels, latents = float(pixel_nats.mean()) / bit, float(normal_nats.mean()) / bit
    return {
        "bits_per_dim_pixels": pixels,
        "bits_per_dim_latents_normal": latents,
        "bits_per_dim_normal": pixels + latents,
    }


def prior_figures(
    pixel_nats: Doubles,
    code_nats: Mapping[str, Doubles],
    codes: Mapping[str, LevelCodes],
    dimensions: int,
    log_posterior: Doubles | None = None,
) -> dict[str, float]:
    """Nats a code (or value) and level, and bits per dimension with their standard error over the images.

    Continuous latents have densities. What they cost is log q(z | x) - log p(z), whose mean is the divergence of the
    posterior from the prior; with log p(x | z) it makes the evidence lower bound (Kingma & Welling 2014, equation 3).

    Args:
        pixel_nats: -log p(x | z) [N] of each image.
        code_nats: level name → -log p(z) [N] of each image's latents at that level, given the coarser ones.
        codes: level name → its latents.
        dimensions: values of an image.
        log_posterior: log q(z | x) [N], where latents are continuous.
    """
    bit = dimensions * math.log(2)
    unit, what = ("code", "codes") if log_posterior is None else ("value", "latents")
    own = sum(code_nats.values(), np.zeros_like(pixel_nats))
    prior = own if log_posterior is None else own + log_posterior
    total = pixel_nats + prior
    length = sum(level.length for level in codes.values())
    return {
        f"nats_per_{unit}": float(own.mean()) / length,
        **{f"nats_per_{unit}_{name}": float(nats.mean()) / codes[name].length for name, nats in code_nats.items()},
        "bits_per_sample": float(prior.mean()) / math.log(2),
        "bits_per_dim": float(total.mean()) / bit,
        "bits_per_dim_error": standard_error(total) / bit,
        f"bits_per_dim_{what}": float(prior.mean()) / bit,
    }


def standard_error(values: Sequence[float] | Doubles) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
