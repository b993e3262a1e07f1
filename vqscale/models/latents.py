"""From what a tokenizer makes of images to latents that a prior models: codes as they are, or draws from posteriors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vqscale.models.gaussian import draw_latents, means_and_scales, posterior_nats
from vqscale.models.network import GridShape


class Drawn(NamedTuple):
    """Latents of some images."""

    latents: list[Tensor]
    """A level each: codes int64 [B, side, side], or fp32 [B, C, side, side]."""
    log_density: Tensor
    """log q(z | x) in nats, fp32 [B], over all levels; 0 where there are codes, which follow from the image."""


def values_of(grids: Sequence[GridShape]) -> int:
    """Random numbers that a draw takes for each sample: those of its continuous latents."""
    return sum(grid.values for grid in grids if grid.continuous)


def draw(encoded: Sequence[Tensor], noise: Tensor) -> Drawn:
    """Draw the latents of each image.

    Args:
        encoded: a level each: codes, integers [B, side, side]; or posteriors, floats [B, 2C, side, side] (`gaussian`).
        noise: standard normal, [B, values], for the levels in their order.
    """
    posteriors = [own.is_floating_point() for own in encoded]
    sizes = [own[0].numel() // 2 if floats else 0 for own, floats in zip(encoded, posteriors, strict=True)]
    latents, density = [], torch.zeros(len(encoded[0]), device=encoded[0].device)
    for own, floats, part in zip(encoded, posteriors, noise.split(sizes, dim=1), strict=True):
        latents.append(draw_latents(own, _like_means(own, part)) if floats else own.long())
        if floats:
            density = density - posterior_nats(own, latents[-1])
    return Drawn(latents, density)


def centres(encoded: Sequence[Tensor]) -> list[Tensor]:
    """The latents that stand for an image: its codes, or the means of its posteriors."""
    return [means_and_scales(own)[0] if own.is_floating_point() else own.long() for own in encoded]


def _like_means(posterior: Tensor, noise: Tensor) -> Tensor:
    return noise.to(posterior.dtype).view(len(posterior), -1, *posterior.shape[2:])
