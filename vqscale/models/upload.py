"""Small tensors from the CPU to where they are used, in the midst of a step."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; the host does not wait for a GPU that is still busy with what came before.

    Without pinned memory it would. Torch keeps such memory, and gives it to others only behind the copy from it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
