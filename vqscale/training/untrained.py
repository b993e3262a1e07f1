"""The strategy of a network without weights: there is nothing to spread, and no step to take."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from vqscale.training.pieces import Piece
from vqscale.training.strategies import Outcome, Strategy


class Untrained(Strategy):
    """Calls the network as it is, on every rank.

    Args:
        model: the bare network, on its device.
    """

    spreads_weights = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Nothing is accumulated."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """No gradient."""

    def step(self, rate: float) -> Outcome:
        """Nothing changes."""
        return Outcome(0.0, True)

    def weights(self) -> list[Piece]:
        """None."""
        return []

    def moments(self) -> list[Piece]:
        """None."""
        return []

    def materialise(self) -> None:
        """Nothing to create."""
