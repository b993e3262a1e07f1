"""Between stored images (uint8, NHWC) and what the networks see (float, NCHW, -1 to 1)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def from_uint8(images: NDArray[np.uint8] | Tensor, device: torch.device) -> Tensor:
    """uint8 [B, S, S, 3] to fp32 [B, 3, S, S] in [-1, 1], channels last in memory; scaled on the device."""
    return torch.as_tensor(images).to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """[B, 3, S, S] in [-1, 1] (clipped) to uint8 [B, S, S, 3]."""
    return to_grey_levels(images).round().to(torch.uint8).contiguous().cpu().numpy()


def to_grey_levels(images: Tensor) -> Tensor:
    """[B, 3, S, S] in [-1, 1] (clipped) to fp32 [B, S, S, 3] in [0, 255], not rounded."""
    return images.detach().float().clamp(-1, 1).add(1).mul(127.5).permute(0, 2, 3, 1)
