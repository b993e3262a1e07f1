"""A distribution of pixels that is fitted to a decoder's reconstructions.

A decoder gives the mean of every pixel, not its distribution, so one is stated: a logistic or a normal distribution
around the mean, cut into the 256 grey levels (Salimans et al. 2017, section 2.1), with a scale for each colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.evaluation.metrics import Doubles
from vqscale.models.pixel_distributions import Family, log_probability

_FIT_PIXELS = 256  # of each image that the scales are fitted to
_NARROWEST, _WIDEST, _PRECISION = 1e-3, 1e3, 1e-4  # of a scale in grey levels, and of its logarithm


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
