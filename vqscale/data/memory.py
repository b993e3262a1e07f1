"""Memory that samples are copied between."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_LINE = 64  # bytes of a cache line


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array with any content that begins at a cache line, as `np.empty` does not.

    AMD's Zen 3 copies some kilobytes at a time eight times slower where the target begins a few bytes further into its
    page than the source (`rep movsb`, glibc bug 30994; docs/log.md).
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    raw = np.empty(size + _LINE, np.uint8)
    # Not as a view of `raw`: views of the array would refer to that then, and `BatchBuffers` counts references.
    owner = (ctypes.c_char * len(raw)).from_buffer(raw.data)
    return np.ndarray(shape, kind, owner, -raw.ctypes.data % _LINE)  # type: ignore[arg-type]
