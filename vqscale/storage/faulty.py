"""A store whose openings can go wrong on demand."""

from __future__ import annotations

import itertools
from typing import Any

from vqscale.faults import Faults
from vqscale.storage import Buffer
from vqscale.storage.store import Store


class FaultyStore(Store):
    """Opens shards as `Store` does, and lets faults happen at point `loader`.

    Args:
        faults: what is asked for.
        options: of `Store`.
    """

    def __init__(self, faults: Faults, **options: Any) -> None:
        super().__init__(**options)
        self._faults, self._openings = faults, itertools.count()

    def open(self, url: str, *, sha256: str = "", size: int | None = None) -> Buffer:
        """A whole shard, or its first half where that is asked for."""
        due = self._faults.at("loader", next(self._openings))
        shard = super().open(url, sha256=sha256, size=size)
        return bytes(shard[: len(shard) // 2]) if "truncate-shard" in due else shard
