"""What can go wrong with a save: the storage, which training survives, or the program, which it does not."""

from __future__ import annotations

import os
import shutil

from torch.distributed.checkpoint.api import CheckpointException

from vqscale import storage
from vqscale.errors import UserError

_SPARE = 16 << 20
"""Bytes that a disk must have left beside a checkpoint, for heads, manifest and logs."""


class CheckpointError(RuntimeError):
    """A save failed for another reason than its storage; a fault of the program, with the ranks' tracebacks."""


def no_room(where: str, size: int) -> str:
    """Why a checkpoint of so many bytes would not fit; empty when it does, and for URLs, whose room nobody knows."""
    path = storage.local_path(where)
    if path is None:
        return ""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(there).free, size + _SPARE
    return "" if free >= needed else f"{needed >> 20} MiB are needed, {free >> 20} MiB are free in {there}"


def storage_fault(error: CheckpointException) -> str:
    """What the storage said, on the first rank on which it failed.

    Raises:
        CheckpointError: something else failed.
    """
    for rank, (fault, _) in sorted(error.failures.items()):
        if not isinstance(fault, (OSError, UserError)):
            raise CheckpointError(str(error)) from None
        text = os.strerror(fault.errno) if isinstance(fault, OSError) and fault.errno else str(fault)
        return f"rank {rank}: {text}"
    raise CheckpointError(str(error)) from None
