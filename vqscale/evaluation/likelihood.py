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
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vqscale.evaluation.metrics import Doubles

Family = Literal["logistic", "gaussian"]

_FIT_PIXELS = 256  # of each image that the scales are fitted to
_NARROWEST, _WIDEST, _PRECISION = 1e-3, 1e3, 1e-4  # of a scale in grey levels, and of its logarithm


class LevelCodes(NamedTuple):
    """The codes of an image at one level."""

    length: int
    """How many."""
    size: int
    """Of the codebook."""


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


def log_probability(family: Family, values: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    """Log of the probability of grey levels 0 to 255; float64 of any shapes that broadcast.

    The levels 0 and 255 hold the tails, so that the 256 probabilities add up to one.
    """
    low = torch.where(values <= 0, -math.inf, (values - 0.5 - means) / scale)
    high = torch.where(values >= 255, math.inf, (values + 0.5 - means) / scale)
    # Both distributions are symmetric; in the left tail differences are exact.
    flipped = low + high > 0
    low, high = torch.where(flipped, -high, low), torch.where(flipped, -low, high)
    log_cumulative = F.logsigmoid if family == "logistic" else torch.special.log_ndtr
    upper, lower = log_cumulative(high), log_cumulative(low)
    return upper + torch.log(-torch.expm1(lower - upper))


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


def prior_figures(
    pixel_nats: Doubles, code_nats: Mapping[str, Doubles], codes: Mapping[str, LevelCodes], dimensions: int
) -> dict[str, float]:
    """Nats a code and level, and bits per dimension with their standard error over the images.

    Args:
        pixel_nats: -log p(x | z_q) [N] of each image.
        code_nats: level name → -log p(z_q) [N] of each image's codes at that level, given the coarser ones.
        codes: level name → its codes.
        dimensions: values of an image.
    """
    bit = dimensions * math.log(2)
    prior = sum(code_nats.values(), np.zeros_like(pixel_nats))
    total = pixel_nats + prior
    length = sum(level.length for level in codes.values())
    return {
        "nats_per_code": float(prior.mean()) / length,
        **{f"nats_per_code_{name}": float(nats.mean()) / codes[name].length for name, nats in code_nats.items()},
        "bits_per_sample": float(prior.mean()) / math.log(2),
        "bits_per_dim": float(total.mean()) / bit,
        "bits_per_dim_error": standard_error(total) / bit,
        "bits_per_dim_codes": float(prior.mean()) / bit,
    }


def standard_error(values: Sequence[float] | Doubles) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
