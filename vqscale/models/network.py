"""What all networks of a prior have in common: latents of some levels, given those of the coarser ones.

The latents of a level are codes, int64 [B, side, side], or continuous, fp32 [B, channels, side, side]; a tokenizer has
either on all of its levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqscale.models.cross_entropy import cross_entropy
from vqscale.models.generate import Draws


@dataclass(frozen=True)
class GridShape:
    """One level as the prior sees it."""

    side: int
    codes: int
    """Size of the codebook; 0 where the latents are continuous."""
    channels: int = 0
    """Channels of continuous latents; 0 where there are codes."""

    @property
    def continuous(self) -> bool:
        """Whether the latents are continuous."""
        return not self.codes

    @property
    def length(self) -> int:
        """Number of cells."""
        return self.side**2

    @property
    def values(self) -> int:
        """Numbers of a sample: one a code, or one a cell and channel."""
        return self.length * (self.channels if self.continuous else 1)


class Network(nn.Module, ABC):
    """Models the latents of one or several neighbouring levels.

    Args:
        grids: the levels that it models, the coarsest first.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on, the coarsest first.
    """

    units: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Modules that a strategy shards, recomputes and compiles each as one; none lies inside another."""
    exact: ClassVar[bool] = True
    """Whether `nats` are the likelihood; else they are an estimate of an upper bound."""
    chances: int = 0
    """Uniform numbers that `nats` takes for each sample."""
    wanted: int = 0
    """Training images that it has to `see` once before all else."""

    def __init__(self, grids: Sequence[GridShape], classes: int, given: Sequence[GridShape] = ()) -> None:
        super().__init__()
        self.grids, self.classes, self.given = tuple(grids), classes, tuple(given)

    @property
    def no_class(self) -> int:
        """Class index that stands for "no class"."""
        return self.classes

    @abstractmethod
    def nats(
        self, given: Sequence[Tensor], latents: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """-log p of each sample's latents, summed over a level; fp32 [B] a level of `grids`.

        Of codes it is the log of a probability, so it is never negative. Of continuous latents it is that of a density.

        Args:
            given: the latents of each level of `given`.
            latents: the latents of each level of `grids`.
            classes: int64 [B].
            chance: fp32 [B, chances], uniform in [0, 1).
            smoothing: share of the target that is spread over all codes; has no meaning where there are none.
        """

    @abstractmethod
    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw the latents of each sample, a level of `grids`.

        Args:
            given: the latents of each level of `given`.
            classes: int64 [B].
            draws: how latents are drawn, and all randomness. It is asked for as many numbers whatever is known.
            known: for each level of `grids` what stays as it is: codes, negative where one is drawn; or continuous
                latents, NaN where they are drawn.
        """

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Memory that `sample` takes for each row of `Draws.rows`, if so much that it may bound their number; else 0.

        Args:
            dtype: in which the network multiplies.
        """
        return 0

    def see(self, first: int, posteriors: Sequence[Tensor], classes: Tensor) -> None:
        """Take in some of the `wanted` images; by itself a network keeps nothing of them.

        Args:
            first: how many images it has seen before.
            posteriors: [n, 2 · channels, side, side] of each level of `given` and `grids`, means, then log scales.
            classes: int64 [n]. Images beyond those that are wanted are left out.
        """


class CodeNetwork(Network):
    """Models codes, by logits of every one of them."""

    @abstractmethod
    def forward(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """Logits of every code, given what the kind lets it see.

        Args:
            given: int64 [B, side, side] a level of `given`.
            codes: int64 [B, side, side] a level of `grids`.
            classes: int64 [B].

        Returns:
            [B, side², K] a level of `grids`.
        """

    def nats(
        self, given: Sequence[Tensor], latents: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """Cross-entropy of the codes, summed over the cells of a level; as `Network.nats`."""
        logits = self(given, latents, classes)
        return [nats(level, grid, smoothing).sum(1) for level, grid in zip(logits, latents, strict=True)]


def unknown(grid: GridShape, count: int, device: torch.device) -> Tensor:
    """Of so many samples' latents nothing: what `Network.sample` takes where all are drawn."""
    if grid.continuous:
        return torch.full((count, grid.channels, grid.side, grid.side), torch.nan, device=device)
    return torch.full((count, grid.side, grid.side), -1, device=device)


def nats(logits: Tensor, codes: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy fp32 [B, T] of codes int64 [B, T] or [B, side, side] under logits [B, T, K], in fp32."""
    return cross_entropy(logits.flatten(0, 1), codes.flatten(), smoothing).view(logits.shape[:2])
