"""Threads for work in many small pieces: each runs torch's operations on one core, whatever torch is set to.

Torch splits every single operation over its threads, and they wait for each other after each. For chains of short
operations it is faster to give every thread a chain of its own, and the results do not depend on the number of threads.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}
_making = threading.Lock()


def single_core_threads(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads; made once, and shared by all who ask for as many."""
    with _making:
        if count not in _pools:
            _pools[count] = _make(count)
        return _pools[count]


def _make(count: int) -> ThreadPoolExecutor:
    # Torch keeps this setting for each thread, and also as what threads inherit that are born later: put that back.
    inherited = torch.get_num_threads()
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread inherits when it first asks, which would undo what is set before
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="vqscale-tiles")
    for _ in range(count):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(inherited)
    return pool


def _forget() -> None:
    """A forked child has none of its parent's threads, and may have been forked while the lock was held."""
    global _making
    _pools.clear()
    _making = threading.Lock()


os.register_at_fork(after_in_child=_forget)
