"""How fast shards can be read from where they lie, through the storage that training uses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vqscale import storage
from vqscale.errors import UserError

_RANGE = 8 << 20
_THREADS = 4


@dataclass(frozen=True)
class Reading:
    """What was read of shards in a while."""

    url: str
    bytes: int
    seconds: float
    fault: str = ""
    """Why nothing could be read."""

    @property
    def mb_s(self) -> float:
        """MB/s over all threads."""
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0


def read_shards(url: str, node: int, nodes: int, limit_s: float = 5.0) -> Reading:
    """Read shards in ranges, each once, for at most `limit_s` seconds.

    Args:
        url: a folder of shards, or one shard.
        node: number of this node; each begins with another shard.
        nodes: how many nodes read.
        limit_s: when to stop.
    """
    try:
        shards = _shards(url)
        first = node * len(shards) // nodes
        began = time.perf_counter()
        read = _read(_ranges(shards[first:] + shards[:first]), began + limit_s)
    except UserError as error:
        return Reading(storage.shown(url), 0, 0.0, str(error))
    return Reading(storage.shown(url), read, time.perf_counter() - began)


def _shards(url: str) -> list[str]:
    names = storage.list_names(url) if not url.endswith(".tar") else None
    shards = [url] if names is None else [storage.join(url, name) for name in names if name.endswith(".tar")]
    if not shards:
        raise UserError("holds no shards (*.tar)", where=url, mend="give a folder of shards, or one shard")
    return shards


def _ranges(shards: list[str]) -> Iterator[tuple[str, int, int]]:
    for shard in shards:
        size = storage.size(shard)
        if size is None:
            raise UserError("no such shard", where=shard, mend="give a folder of shards, or one shard")
        _forget(shard)
        yield from ((shard, start, min(start + _RANGE, size)) for start in range(0, size, _RANGE))


def _forget(shard: str) -> None:
    """Pages that this machine has cached would be read at the speed of its memory."""
    path = storage.local_path(shard)
    if path is not None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read(waiting: Iterator[tuple[str, int, int]], limit: float) -> int:
    lock = threading.Lock()

    def work(_: int) -> int:
        total = 0
        while time.perf_counter() < limit:
            with lock:
                one = next(waiting, None)
            if one is None:
                break
            total += len(storage.read_range(*one))
        return total

    with ThreadPoolExecutor(_THREADS) as threads:
        return sum(threads.map(work, range(_THREADS)))
