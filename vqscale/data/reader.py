"""One exact pass over shards, for evaluation: every sample once over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.data.bad import BadCount, BadPick
from vqscale.data.loader import Batch
from vqscale.data.order import evaluation_shards
from vqscale.data.source import Fields, OpenGroup, Source


class EvaluationReader:
    """One pass over this rank's shards: every sample once, in batches, the last one short, nothing padded.

    Over all ranks each sample is read exactly once. Ranks may have different numbers of batches, or none. Bad
    samples are left out and counted.

    Args:
        source: where the samples are.
        counts: samples of each shard.
        rank: this rank.
        world: number of ranks.
        batch: samples that are read at once.
        threads: threads that decode.
        error_budget: largest share of bad samples; alone, a rank stops only when its own are too many for all ranks.
    """

    def __init__(
        self,
        source: Source,
        counts: Sequence[int],
        rank: int,
        world: int,
        batch: int,
        *,
        threads: int = 1,
        error_budget: float = 0.001,
    ) -> None:
        self._source, self._batch, self._threads = source, batch, threads
        self._counts, self._count = list(counts), BadCount(error_budget, world)
        self.bad: Mapping[str, int] = self._count.kinds
        """Bad samples so far, by kind."""
        self._shards = evaluation_shards(len(self._counts), rank, world)

    @property
    def samples(self) -> int:
        """Samples of this rank's shards."""
        return sum(self._counts[shard] for shard in self._shards)

    @property
    def read(self) -> int:
        """Samples that were read so far, the bad ones included."""
        return self._count.read

    @property
    def bad_samples(self) -> list[tuple[str, str, str]]:
        """(shard, key, kind) of the bad samples."""
        return list(self._count.samples)

    def __iter__(self) -> Iterator[Batch]:
        held: list[tuple[Fields, NDArray[np.int64]]] = []
        for part in self._parts():
            held.append(part)
            while sum(len(index) for _, index in held) >= self._batch:
                whole, held = _cut(held, self._batch)
                yield Batch(0, *whole)
        if held:
            yield Batch(0, *_join(held))

    def _parts(self) -> Iterator[tuple[Fields, NDArray[np.int64]]]:
        """Up to a batch of good samples, and their numbers in the whole data set."""
        starts = np.concatenate([[0], np.cumsum(self._counts)])
        shards = [shard for shard in self._shards if self._counts[shard]]
        with ThreadPoolExecutor(1) as opener, ThreadPoolExecutor(self._threads) as pool:
            opening = [opener.submit(self._source.open_group, [shard]) for shard in shards[:1]]
            for number, shard in enumerate(shards):
                group = opening.pop().result()
                opening = [opener.submit(self._source.open_group, [after]) for after in shards[number + 1 : number + 2]]
                for start in range(0, self._counts[shard], self._batch):
                    picks = np.arange(start, min(self._counts[shard], start + self._batch))
                    fields, bad = self._read(pool, group, picks)
                    self._count.add(len(picks), bad)
                    good = np.delete(np.arange(len(picks)), [pick.place for pick in bad])
                    if len(good) < len(picks):
                        fields = {name: values[good] for name, values in fields.items()}
                    if len(good):
                        yield fields, starts[shard] + picks[good]

    def _read(self, pool: Executor, group: OpenGroup, picks: NDArray[np.int64]) -> tuple[Fields, list[BadPick]]:
        """Samples of a group, shared out over the threads."""
        fields = {name: spec.empty(len(picks)) for name, spec in self._source.spec.items()}
        ends = [number * len(picks) // self._threads for number in range(self._threads + 1)]
        spans = [(start, end) for start, end in pairwise(ends) if start < end]
        tasks = [(start, pool.submit(group.read, picks[start:end], fields, start)) for start, end in spans]
        return fields, [found._replace(place=start + found.place) for start, task in tasks for found in task.result()]


def _join(parts: list[tuple[Fields, NDArray[np.int64]]]) -> tuple[Fields, NDArray[np.int64]]:
    if len(parts) == 1:
        return parts[0]
    fields = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return fields, np.concatenate([part[1] for part in parts])


def _cut(parts: list[tuple[Fields, NDArray[Any]]], size: int) -> tuple[Any, list[Any]]:
    """The first `size` samples, and what is left."""
    fields, index = _join(parts)
    rest = ({name: values[size:] for name, values in fields.items()}, index[size:])
    return ({name: values[:size] for name, values in fields.items()}, index[:size]), [rest] if len(rest[1]) else []
