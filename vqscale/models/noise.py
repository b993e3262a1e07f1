"""Random numbers that follow from what they are for, so that held-out figures repeat, whatever the batch or rank."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniforms_of(rows: NDArray[np.generic], count: int) -> Tensor:
    """Numbers in [0, 1), fp32 [n, count], each row's from the bytes of `rows` [n, ...] alone."""
    return _stacked([torch.rand(count, generator=generator) for generator in _generators(rows)], count)


def normals_of(rows: NDArray[np.generic], count: int) -> Tensor:
    """As `uniforms_of`, from the standard normal distribution."""
    return _stacked([torch.randn(count, generator=generator) for generator in _generators(rows)], count)


def _generators(rows: NDArray[np.generic]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(zlib.crc32(np.ascontiguousarray(row).tobytes())) for row in rows]


def _stacked(numbers: list[Tensor], count: int) -> Tensor:
    return torch.stack(numbers) if numbers else torch.empty(0, count)
