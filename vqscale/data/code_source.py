"""Code shards as a source for the loader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vqscale.data.bad import BadPick
from vqscale.data.codes import OpenCodes, check_index, empty_fields
from vqscale.data.manifest import CODES
from vqscale.data.shards import ShardSet
from vqscale.data.source import Fields, Spec, read_in_batches
from vqscale.errors import UserError
from vqscale.storage.store import Store


class CodeSource:
    """Code shards.

    Fields: for each level its name, uint16 [side, side], or of continuous latents float32 [2C, side, side], means and
    log deviations of their posteriors; and `label` int64 (-1 for none).

    Args:
        shards: the shards.
        store: opens them.
    """

    def __init__(self, shards: ShardSet, store: Store | None = None) -> None:
        manifest = shards.manifest
        if manifest.format != CODES:
            raise UserError(
                f"holds {manifest.format}, not codes", where=shards.spec, mend="name a folder of code shards"
            )
        self.shards, self.manifest, self.store = shards, manifest, store or Store()
        self.spec = {level.name: Spec(level.sample, np.dtype(level.dtype)) for level in manifest.levels}
        self.spec["label"] = Spec((), np.dtype(np.int64))

    def name(self, shard: int) -> str:
        """Name of a shard in messages."""
        return self.shards.name(shard)

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Size of some shards together as they lie in memory: unpacked, and as they are for the sake of their keys."""
        sample = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.spec.values())
        stated = [self.manifest.shards[shard] for shard in shards]
        return sum(sample * shard.samples + shard.bytes for shard in stated)

    def open_group(self, shards: Sequence[int]) -> CodeGroup:
        """Read and unpack shards into memory.

        Raises:
            UserError: a shard is absent, damaged, or another one than the manifest says.
        """
        opened = [self.open(shard) for shard in shards]
        fields = empty_fields(self.manifest.levels, sum(one.index.samples for one in opened))
        row = 0
        for one in opened:
            one.read(fields, row)
            row += one.index.samples
        return CodeGroup(fields, opened)

    def open(self, shard: int) -> OpenCodes:
        """Open a shard, compare its index with the manifest, unpack nothing; raises as `open_group`."""
        where, stated = self.shards.urls[shard], self.manifest.shards[shard]
        opened = OpenCodes(self.store.open(where, sha256=stated.sha256, size=stated.bytes), where)
        check_index(opened.index, self.manifest, stated.samples, where)
        return opened

    def read_shard(
        self, shard: int, batch: int, bad: list[BadPick] | None = None
    ) -> Iterator[tuple[Fields, list[str]]]:
        """The samples of a shard in order, as (fields, keys) of up to `batch` samples."""
        return read_in_batches(self, shard, self.manifest.counts[shard], batch, bad)


class CodeGroup:
    """Codes of some shards in memory, numbered through."""

    def __init__(self, fields: Fields, opened: Sequence[OpenCodes]) -> None:
        self._fields, self._opened = fields, opened
        self._keys: list[str] | None = None

    def keys(self, picks: NDArray[np.int64]) -> list[str]:
        """Keys of samples by number within the group; unpacked when they are first asked for."""
        if self._keys is None:
            self._keys = [key for one in self._opened for key in one.read_keys()]
        return [self._keys[pick] for pick in picks.tolist()]

    def read(self, picks: NDArray[np.int64], out: Fields, row: int) -> list[BadPick]:
        """Gather samples into the rows from `row` on; codes cannot be bad one by one."""
        for name, array in self._fields.items():
            # In the mode `raise` numpy would gather into memory of its own first.
            array.take(picks, axis=0, out=out[name][row : row + len(picks)], mode="clip")
        return []
