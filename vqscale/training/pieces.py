"""The state of a training, as ranges of tensors under names that belong to no engine.

Every strategy holds the same tensors and cuts them in its own way. A `Piece` is one contiguous cut of one tensor on one
rank, and a view of the live memory: reading it is saving, writing into it is resuming. So a checkpoint knows neither
the strategy nor the number of ranks that wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.training.distributed import Ranks

MODEL, OPTIMIZER, EXTRA = "model", "optimizer", "extra"
"""First parts of the names: parameters and buffers; `optimizer/NAME/KEY/PARAMETER`; what a task keeps besides."""


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one tensor's elements, counted in row-major order of its full shape, as this rank holds it.

    Several ranks may hold the same elements; then their values are equal. A rank may hold none (`local` is empty).
    Several pieces may share their memory, where an engine keeps one count of steps for many parameters.
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


def assemble(pieces: Iterable[Piece], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Full tensors by name, one after the other, on every rank; collective. What a rank holds whole is not copied.

    Bits are added, so a value arrives as it was sent, negative zeros included. Ranks must name the same pieces, and
    either hold all of a tensor each, or ranges that do not overlap.
    """
    pieces = list(pieces)
    held = torch.tensor([piece.local.numel() for piece in pieces], device=ranks.device)
    for piece, total in zip(pieces, ranks.sum(held).tolist(), strict=True):
        if total == ranks.world * math.prod(piece.shape):
            yield piece.name, piece.local.detach().reshape(piece.shape)
            continue
        full = torch.zeros(math.prod(piece.shape), dtype=piece.local.dtype, device=ranks.device)
        full[piece.start : piece.stop] = piece.values()
        ranks.sum(full.view(torch.uint8))
        yield piece.name, full.view(piece.shape)


def fill(pieces: Iterable[Piece], tensors: Mapping[str, Tensor]) -> None:
    """Write full tensors by name into the live memory; every piece must be among them, in its shape and dtype.

    Raises:
        ValueError: names the first piece that is not.
    """
    for piece in pieces:
        full = tensors.get(piece.name)
        if full is None:
            raise ValueError(f"{piece.name} is missing")
        if (tuple(full.shape), full.dtype) != (piece.shape, piece.local.dtype):
            raise ValueError(f"{piece.name} is {full.dtype} {list(full.shape)}, not {list(piece.shape)}")
        piece.fill(full.reshape(-1)[piece.start : piece.stop].to(piece.local.device))
