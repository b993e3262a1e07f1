"""Dropping files from this machine's page cache, and seeing whether they are gone."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def drop(paths: Iterable[Path]) -> float:
    """Ask the kernel to drop files from its page cache.

    Pages that are mapped or not written yet stay, and some file systems keep all. A disk's own cache, or that of the
    host of a virtual machine, is not touched.

    Returns:
        Share of the files' pages that are still there.
    """
    kept = pages = 0
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            here, whole = _resident(file.fileno())
        kept, pages = kept + here, pages + whole
    return kept / max(1, pages)


def _resident(descriptor: int) -> tuple[int, int]:
    """Pages of a file in the page cache, and pages in all."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return 0, 0
    pages = -(-size // mmap.PAGESIZE)
    # Private and writable, since ctypes refuses to take the address of a read-only mapping; nothing is written.
    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        states = (ctypes.c_ubyte * pages)()
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), states
        )
        del start  # a mapping that is pointed to cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(state & 1 for state in states), pages
