"""Random numbers that follow from what they are for, whatever the batch or rank.

Those of held-out samples follow from the samples, so that their figures repeat. Those of a step follow from a seed and
the samples' places in the global batch: with a counter-based generator (Philox, Salmon et al. 2011) a rank begins at
any sample, and draws for its own alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from torch import Tensor


def uniforms_of(rows: NDArray[np.generic], count: int) -> Tensor:
    """Numbers in [0, 1), fp32 [n, count], each row's from the bytes of `rows` [n, ...] alone."""
    return _stacked([torch.rand(count, generator=generator) for generator in _generators(rows)], count)


def normals_of(rows: NDArray[np.generic], count: int) -> Tensor:
    """As `uniforms_of`, from the standard normal distribution."""
    return _stacked([torch.randn(count, generator=generator) for generator in _generators(rows)], count)


def uniforms_at(seed: int, index: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1), fp32 [n, count], each row's from `seed` and its place in `index`, int64 [n] on the CPU."""
    return _counted(seed, index, count, Generator.random)


def normals_at(seed: int, index: Tensor, count: int) -> Tensor:
    """As `uniforms_at`, from the standard normal distribution."""
    return _counted(seed, index, count, Generator.standard_normal)


def _counted(seed: int, index: Tensor, count: int, fill: Callable[..., object]) -> Tensor:
    numbers = np.empty((len(index), count), np.float32)
    bits = Philox(key=seed)
    generator, state = Generator(bits), bits.state
    for row, place in zip(numbers, index.tolist(), strict=True):
        # 2^128 numbers lie between two places. A generator of its own for each would take ten times as long to make.
        state["state"]["counter"][:] = 0, 0, place, 0
        bits.state = state
        fill(generator, dtype=np.float32, out=row)
    return torch.from_numpy(numbers)


def _generators(rows: NDArray[np.generic]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(zlib.crc32(np.ascontiguousarray(row).tobytes())) for row in rows]


def _stacked(numbers: list[Tensor], count: int) -> Tensor:
    return torch.stack(numbers) if numbers else torch.empty(0, count)
