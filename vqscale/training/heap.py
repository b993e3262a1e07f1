"""Main memory for training on a CPU: kept by the process once it has it, and in huge pages.

A step allocates the same hundreds of megabytes again and again. By default glibc maps each large block anew, and the
kernel clears it page by page; and with small pages most accesses of a layer miss the processor's table of pages.
"""

from __future__ import annotations

import ctypes
import os

import torch

_SWITCH = "THP_MEM_ALLOC_ENABLE"
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's mallopt(3)
_PAD = 64 * 2**20


def keep_heap() -> None:
    """Let this process keep what it frees, and torch ask for huge pages; results stay the same.

    Call it before torch allocates any tensor: it decides about huge pages then, for good. Children inherit nothing.
    Without glibc only the second takes effect; on a kernel without transparent huge pages, only the first.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _PAD)):
            libc.mallopt(option, value)
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    torch.empty(1)  # the first tensor: now it has looked
    if before is None:
        del os.environ[_SWITCH]
    else:
        os.environ[_SWITCH] = before
