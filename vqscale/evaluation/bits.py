"""Figures of likelihood under a tokenizer and a prior, in bits per dimension and nats a code.

With z_q the codes of the image, log p(x) >= log p(x | z_q) + log p(z_q), since p(x) also sums over all other codes (van
den Oord et al. 2017, section 3.3). So what is computed here are bits that suffice, an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vqscale.evaluation.metrics import Doubles


class LevelCodes(NamedTuple):
    """The latents of an image at one level: codes, or continuous ones."""

    length: int
    """How many numbers."""
    size: int
    """Of the codebook; 0 where they are continuous."""


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
