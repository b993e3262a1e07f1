"""The state of a training, as ranges of tensors under names that belong to no engine.

Every strategy holds the same tensors and cuts them in its own way. A `Piece` is one contiguous cut of one tensor on one
rank, and a view of the live memory: reading it is saving, writing into it is resuming. So a checkpoint knows neither
the strategy nor the number of ranks that wrote it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

MODEL, OPTIMIZER, EXTRA = "model", "optimizer", "extra"
"""First parts of the names: parameters and buffers; `optimizer/NAME/KEY/PARAMETER`; what a task keeps besides."""


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one tensor's elements, counted in row-major order of its full shape, as this rank holds it.

    Several ranks may hold the same elements; then their values are equal. A rank may hold none (`local` is empty).
    """

    name: str
    """Canonical and independent of the engine: "model/encoders.0.0.weight", "optimizer/adamw/exp_avg/norm.weight",
    "optimizer/adamw/step/norm.weight", "extra/average.norm.weight"."""
    shape: tuple[int, ...]
    """Of the full tensor."""
    start: int
    """First element, in the flattened full tensor."""
    local: Tensor
    """What this rank holds, in any memory layout: `local.reshape(-1)` are its elements in order."""

    @property
    def stop(self) -> int:
        """First element behind the piece."""
        return self.start + self.local.numel()

    @property
    def whole(self) -> bool:
        """Whether this rank holds all elements."""
        return self.local.numel() == math.prod(self.shape)

    def values(self) -> Tensor:
        """The elements in order, [stop - start]; a view of the live memory where its layout allows."""
        return self.local.detach().reshape(-1)

    def fill(self, values: Tensor) -> None:
        """Write elements in order, [stop - start], into the live memory."""
        self.local.detach().copy_(values.view(self.local.shape))


def whole(name: str, tensor: Tensor) -> Piece:
    """A tensor that this rank holds completely."""
    return Piece(name, tuple(tensor.shape), 0, tensor.detach())
