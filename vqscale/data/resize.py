"""Resizing of uint8 images: bicubic with antialiasing."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def resize(image: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Resize a square image: bicubic (a = -0.5), the filter widened where it shrinks, so that nothing aliases.

    The result is Pillow's BICUBIC within one grey level, several times as fast.

    Args:
        image: uint8 [side, side, 3]; may be a view, such as a crop.
        out: uint8 [size, size, 3], C-contiguous; receives the result.
    """
    if image.shape == out.shape:
        out[:] = image
        return
    source, target = (_planes(array) for array in (image, out))
    _kernel()(source, list(out.shape[:2]), False, None, None, out=target)


def _planes(image: NDArray[np.uint8]) -> Any:
    """The same memory as a torch tensor [1, 3, H, W]."""
    import torch

    return torch.from_numpy(image).permute(2, 0, 1)[None]


@cache
def _kernel() -> Any:
    """`F.interpolate(mode="bicubic", antialias=True)` as the operator that writes into given memory.

    Torch has the fastest vectorised kernel for it that releases the interpreter's lock. F.interpolate itself returns
    planes, and interleaving them again takes as long as the resizing. Imported here, at the first use: images that
    are stored at the wanted size need no torch.
    """
    import torch

    return torch.ops.aten._upsample_bicubic2d_aa.out
