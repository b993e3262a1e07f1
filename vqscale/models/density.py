"""What networks over continuous latents have in common, and the standard normal distribution, the prior of a plain VAE.

A flow is an invertible map from latents z to noise u of the same shape, so that by the change of variables
log p(z) = log N(u; 0, I) + log |det du/dz| (Rezende & Mohamed 2015). Temperature acts on the noise that is drawn
(Kingma & Dhariwal 2018, section 6); truncation and guidance have nothing to act on.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqscale.models.conditioning import Conditioner
from vqscale.models.generate import Draws
from vqscale.models.network import GridShape, Network

_BOUND = 2.0
"""Of a log scale: exp(2) at most and exp(-2) at least in one layer, and a slope of 1 where training begins."""


def normal_nats(values: Tensor) -> Tensor:
    """-log of the standard normal density of each of the values."""
    return (values.square() + math.log(2 * math.pi)) / 2


def bounded(log_scale: Tensor) -> Tensor:
    """A log scale that one layer cannot make so large that the next one overflows."""
    return _BOUND * torch.tanh(log_scale / _BOUND)


class Normal(Network):
    """Standard normal latents, whatever class and coarser levels: nothing is learned."""

    def nats(
        self, given: Sequence[Tensor], latents: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """-log N(z; 0, I) of each sample."""
        return [normal_nats(level).flatten(1).sum(1) for level in latents]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw every value by itself."""
        return [kept_or(kept, noise(grid, draws).float()) for grid, kept in zip(self.grids, known, strict=True)]


def noise(grid: GridShape, draws: Draws) -> Tensor:
    """What a level is drawn from: float64 [B, channels, side, side] of the standard normal times the temperature."""
    return draws.normals(grid.values).unflatten(1, (grid.channels, grid.side, grid.side)) * draws.sampling.temperature


def kept_or(known: Tensor, drawn: Tensor) -> Tensor:
    """What is known, and what was drawn where that is NaN."""
    return torch.where(known.isnan(), drawn.to(known.dtype), known)


class Flow(Network):
    """One level, by an invertible map.

    Args:
        grids: the one level that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        width: channels of what the map is told.
    """

    def __init__(self, grids: Sequence[GridShape], classes: int, given: Sequence[GridShape], width: int) -> None:
        super().__init__(grids, classes, given)
        (self.grid,) = grids
        side = self.grid.side
        self.class_everywhere = nn.Embedding(classes + 1, width)  # the last one stands for "no class"
        self.positions = nn.ParameterList([nn.Parameter(torch.zeros(width, side, side))])
        self.condition = Conditioner(given, side, width) if given else None

    @abstractmethod
    def to_noise(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and log |det du/dz| [B] of latents; both in their dtype.

        Args:
            z: [B, channels, side, side].
            context: what is told of each cell, [B, width, side, side].
        """

    @abstractmethod
    def from_noise(self, u: Tensor, context: Tensor) -> Tensor:
        """The inverse of `to_noise`; what it gives a sample does not depend on the others.

        Args:
            u: [B, channels, side, side]; computed in its dtype, but for the networks inside.
            context: as for `to_noise`.
        """

    def nats(
        self, given: Sequence[Tensor], latents: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """-log N(u; 0, I) - log |det du/dz| of each sample, in fp32 or wider under autocast too."""
        (z,) = latents
        context = self._context(classes, None if self.condition is None else self.condition(given))
        u, log_determinant = self.to_noise(z, context)
        return [normal_nats(u).flatten(1).sum(1) - log_determinant]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw noise and map it back. What is known is put in its place, and does not tell the rest of the level:
        each of these values depends on all of the noise.
        """
        condition = None if self.condition is None else self.condition.apart(given)
        z = self.from_noise(noise(self.grid, draws), self._context(classes, condition))
        return [kept_or(known[0], z)]

    def _context(self, classes: Tensor, condition: Tensor | None) -> Tensor:
        """What is told of each cell: [B, width, side, side]."""
        told = self.class_everywhere(classes)[:, :, None, None] + self.positions[0]
        return told if condition is None else told + condition
