"""What a training step of the tokenizer has to compute and to move, by formula, layer by layer; and how to count it.

A convolution multiplies and adds k² · in · out times at each place of its grid: that of its output, or, if it is
transposed, of its input. Training computes it three times: the output, the gradient of the kernel, and that of the
input, which the first layer does not need. Each of the three reads two operands and writes one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqscale.models.convnets import Widths, doublings, trunk_width
from vqscale.models.vqvae import LevelShape


@dataclass(frozen=True)
class Convolution:
    """A layer, by its shapes."""

    inputs: int
    """Channels."""
    outputs: int
    """Channels."""
    kernel: int
    """Side of the kernel."""
    side: int
    """Side of the input."""
    stride: int = 1
    transposed: bool = False
    first: bool = False
    """Whether it reads the images, whose gradient nobody needs."""

    @property
    def padding(self) -> int:
        """Rows around the input."""
        return (self.kernel - 1) // 2

    @property
    def out_side(self) -> int:
        """Side of the output."""
        return self.side * self.stride if self.transposed else self.side // self.stride

    @property
    def flops(self) -> int:
        """Operations of the forward, for one image; a multiplication and an addition are two."""
        places = min(self.side, self.out_side) ** 2
        return 2 * self.kernel**2 * self.inputs * self.outputs * places

    @property
    def training_flops(self) -> int:
        """Operations of forward and backward, for one image."""
        return (2 if self.first else 3) * self.flops

    def training_bytes(self, batch: int, size: int) -> int:
        """Bytes that forward and backward of a batch move, each operand once, with numbers of `size` bytes."""
        read, written = self.inputs * self.side**2 * batch, self.outputs * self.out_side**2 * batch
        kernel = self.kernel**2 * self.inputs * self.outputs
        return (2 if self.first else 3) * (read + written + kernel) * size


def convolutions(shapes: Sequence[LevelShape], dims: Sequence[int], side: int, channels: int = 3) -> list[Convolution]:
    """All layers of a `VQVAE` whose codes are not projected.

    Args:
        shapes: of its levels.
        dims: channels of the codes of each level.
        side: of the images.
        channels: of the images.
    """
    found: list[Convolution] = []
    above = [*dims[1:], 0]
    for level, shape in enumerate(shapes):
        hidden = shape.widths.hidden
        found += _encoder(channels, side, shape.factor, shape.widths, first=not level)
        grid = side // shape.factor
        found.append(Convolution(hidden + above[level], dims[level], 1, grid))
        if level:  # the context and the upsampled codes for the level below
            found += _decoder(dims[level] + above[level], dims[level], grid, shape.factor, shape.widths)
            found += _upsampler(sum(dims[level:]), grid, shape.factor)
        else:
            found += _decoder(sum(dims), channels, grid, shape.factor, shape.widths)
        channels, side = hidden, grid
    return found


def _encoder(channels: int, side: int, factor: int, widths: Widths, *, first: bool) -> Iterator[Convolution]:
    for step in range(doublings(factor)):
        out = widths.hidden if step else widths.hidden // 2
        yield Convolution(channels, out, 4, side, stride=2, first=first and not step)
        channels, side = out, side // 2
    yield Convolution(channels, widths.hidden, 3, side)
    yield from _residuals(side, widths)


def _residuals(side: int, widths: Widths) -> Iterator[Convolution]:
    for _ in range(widths.residual_blocks):
        yield Convolution(widths.hidden, widths.residual_hidden, 3, side)
        yield Convolution(widths.residual_hidden, widths.hidden, 1, side)


def _decoder(channels: int, out: int, side: int, factor: int, widths: Widths) -> Iterator[Convolution]:
    yield Convolution(channels, widths.hidden, 3, side)
    yield from _residuals(side, widths)
    channels = widths.hidden
    for _ in range(doublings(factor) - 1):
        yield Convolution(channels, widths.hidden // 2, 4, side, stride=2, transposed=True)
        channels, side = widths.hidden // 2, side * 2
    yield Convolution(trunk_width(factor, widths), out, 4, side, stride=2, transposed=True)


def _upsampler(channels: int, side: int, factor: int) -> Iterator[Convolution]:
    for step in range(doublings(factor)):
        yield Convolution(channels, channels, 4, side << step, stride=2, transposed=True)


def search_flops(codes: Sequence[int], dims: Sequence[int], grids: Sequence[int]) -> int:
    """Operations of the nearest-code search for one image, 2 · K · D for each code of its grids."""
    return sum(2 * size * dim * side**2 for size, dim, side in zip(codes, dims, grids, strict=True))


class OperandBytes(TorchDispatchMode):
    """Counts the bytes of what convolutions read and write while it is entered, each operand of each once."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self._add(*args[:2], result)
        elif func is torch.ops.aten.convolution_backward.default:
            gradient, image, kernel = args[:3]
            if result[0] is not None:
                self._add(gradient, kernel, result[0])
            self._add(gradient, image, result[1])
        return result

    def _add(self, *operands: Tensor) -> None:
        self.total += sum(operand.nbytes for operand in operands)
