"""What all networks of a prior have in common: codes of some levels, given those of the coarser ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from vqscale.models.cross_entropy import cross_entropy
from vqscale.models.generate import Draws


@dataclass(frozen=True)
class GridShape:
    """One level as the prior sees it."""

    side: int
    codes: int

    @property
    def length(self) -> int:
        """Number of cells."""
        return self.side**2


class Network(nn.Module, ABC):
    """Models the codes of one or several neighbouring levels.

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

    def __init__(self, grids: Sequence[GridShape], classes: int, given: Sequence[GridShape] = ()) -> None:
        super().__init__()
        self.grids, self.classes, self.given = tuple(grids), classes, tuple(given)

    @property
    def no_class(self) -> int:
        """Class index that stands for "no class"."""
        return self.classes

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
        self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """Nats of each sample's codes, summed over the cells of a level; fp32 [B] a level of `grids`.

        Args:
            given: as for `forward`.
            codes: as for `forward`.
            classes: as for `forward`.
            chance: fp32 [B, chances], uniform in [0, 1).
            smoothing: share of the target that is spread over all codes.
        """
        logits = self(given, codes, classes)
        return [nats(level, grid, smoothing).sum(1) for level, grid in zip(logits, codes, strict=True)]

    @abstractmethod
    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw the codes of each sample: int64 [B, side, side] a level of `grids`.

        Args:
            given: int64 [B, side, side] a level of `given`.
            classes: int64 [B].
            draws: how codes are drawn, and all randomness. It is asked for as many numbers whatever is known.
            known: int64 [B, side, side] a level of `grids`: codes that stay as they are; negative where one is drawn.
        """


def nats(logits: Tensor, codes: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy fp32 [B, T] of codes int64 [B, T] or [B, side, side] under logits [B, T, K], in fp32."""
    return cross_entropy(logits.flatten(0, 1), codes.flatten(), smoothing).view(logits.shape[:2])
