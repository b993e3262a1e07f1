"""Work on many shards side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = min(8, len(os.sched_getaffinity(0)) + 4)
"""Shards that are read at the same time; of those that are remote, so many are in memory."""


def in_threads(call: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """The results in the order of the items; after an error, or Ctrl-C, nothing more is begun.

    Args:
        call: called from several threads.
        items: one for each call.
        threads: calls at the same time.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="vqscale-shards")
    try:
        yield from pool.map(call, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
