"""Every code equally likely: the baseline of all priors. Nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.models.generate import Draws
from vqscale.models.network import CodeNetwork


class Uniform(CodeNetwork):
    """log K nats a code, whatever the class."""

    def forward(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """Logits of zero."""
        return [torch.zeros(len(classes), grid.length, grid.codes, device=classes.device) for grid in self.grids]

    def nats(
        self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """side² · log K for each sample."""
        shape, device = (len(classes),), classes.device
        return [torch.full(shape, grid.length * math.log(grid.codes), device=device) for grid in self.grids]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw with equal chances; temperature and truncation have nothing to act on."""
        found = []
        for grid, kept in zip(self.grids, known, strict=True):
            drawn = (draws.uniforms(grid.length) * grid.codes).long().view_as(kept)
            found.append(torch.where(kept < 0, drawn, kept))
        return found
