"""What the checkpoints need of those whom they serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from vqscale.config.training import Training
from vqscale.training.pieces import Piece


class Engine(Protocol):
    """What is saved, as the engine gives it."""

    training: Training
    strategy: str

    def pieces(self) -> list[Piece]:
        """What this rank holds of the network and the optimizers."""

    def materialise_optimizer(self) -> None:
        """Make the optimizers' tensors, which there are not before the first step."""

    def loaded(self) -> None:
        """Called when the pieces have got their values."""


class Task(Protocol):
    """What a task keeps besides."""

    def pieces(self) -> list[Piece]:
        """What lies over the ranks as the weights do."""

    def extra_state(self) -> Mapping[str, Tensor]:
        """The rest: whole tensors by name, equal on all ranks."""

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `extra_state` gave."""


class Journal(Protocol):
    """Where it is said what became of a save: on rank 0 a `Tracker`."""

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures for TensorBoard."""

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """A line in the events."""
