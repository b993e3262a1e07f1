"""Diagonal Gaussian posteriors of continuous latents: fp32 [B, 2 · channels, side, side], means, then log scales.

A log scale is the logarithm of a standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.models.density import normal_nats


def means_and_scales(posterior: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log scales, [B, channels, ...] each, of a posterior [B, 2 · channels, ...]."""
    means, log_scales = posterior.chunk(2, dim=1)
    return means, log_scales


def one_row_each(levels: Sequence[Tensor]) -> Tensor:
    """Posteriors [N, 2 · channels, side, side] a level to [N, 2 · D]: all means, then all log scales."""
    parts = [means_and_scales(level) for level in levels]
    return torch.cat([part.flatten(1) for halves in zip(*parts, strict=True) for part in halves], dim=1)


def draw_latents(posterior: Tensor, normals: Tensor) -> Tensor:
    """Latents mean + scale · eps (Kingma & Welling 2014, section 2.4), [B, channels, ...]; differentiable.

    Args:
        posterior: [B, 2 · channels, ...].
        normals: eps [B, channels, ...], from the standard normal distribution.
    """
    means, log_scales = means_and_scales(posterior)
    return means + log_scales.exp() * normals


def posterior_nats(posterior: Tensor, latents: Tensor) -> Tensor:
    """-log q(z | x) [B] of latents [B, channels, ...] under posteriors [B, 2 · channels, ...], summed over values."""
    means, log_scales = means_and_scales(posterior)
    return (normal_nats((latents - means) * (-log_scales).exp()) + log_scales).flatten(1).sum(1)


def kl_to_normal(posterior: Tensor) -> Tensor:
    """KL(q(z | x) || N(0, I)) of every value, [B, channels, ...] (Kingma & Welling 2014, appendix B)."""
    means, log_scales = means_and_scales(posterior)
    return (means.square() + (2 * log_scales).exp() - 1) / 2 - log_scales


def component_nats(posteriors: Tensor, latents: Tensor) -> Tensor:
    """-log density of each of n latents under each of N posteriors: float64 [n, N], by products of matrices.

    Args:
        posteriors: [N, 2 · D], means, then log scales.
        latents: [n, D]; NaN where a value is unknown, which is integrated out.
    """
    means, log_scales = means_and_scales(posteriors.double())
    seen = ~latents.isnan()
    values, given = torch.where(seen, latents, 0.0).double(), seen.double()
    # (z - m)² / s² in three terms, which cancel: this needs fp64.
    precisions = (-2 * log_scales).exp()
    fixed = means.square() * precisions / 2 + log_scales + math.log(2 * math.pi) / 2
    return values.square() @ precisions.T / 2 - values @ (means * precisions).T + given @ fixed.T
