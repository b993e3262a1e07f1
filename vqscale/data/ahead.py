"""Whole shards in order, decoded in threads ahead of whoever uses them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqscale.data.bad import BadPick
from vqscale.data.source import Fields, OpenGroup, Source, without

_AHEAD = 2  # parts that are prepared while one is used
_PIECE = 16  # samples that a thread decodes at once


class ShardPart(NamedTuple):
    """Consecutive samples of one shard."""

    shard: int
    """Number of the shard."""
    read: int
    """Samples that were read, the bad ones included."""
    fields: Fields
    """The good ones."""
    keys: list[str]
    """Their keys."""
    bad: list[BadPick]
    """The bad ones."""


def read_ahead(
    source: Source, counts: Sequence[int], shards: Sequence[int], *, batch: int, threads: int
) -> Iterator[ShardPart]:
    """All samples of some shards in order; where parts begin and end does not depend on the number of threads.

    Args:
        source: the shards.
        counts: samples of each of its shards.
        shards: which of them; one without samples gives one empty part.
        batch: samples of a part; the last one of a shard may have fewer. Three parts are in memory at a time.
        threads: threads that decode; one more opens the next shard.

    Raises:
        UserError: a shard cannot be opened.
    """
    with ExitStack() as stack:
        opener, pool = (ThreadPoolExecutor(number, thread_name_prefix="vqscale-ahead") for number in (1, threads))
        for executor in (opener, pool):
            stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        waiting: deque[_Pending] = deque()
        for pending in _begin(source, counts, shards, batch, opener, pool):
            waiting.append(pending)
            if len(waiting) > _AHEAD:
                yield waiting.popleft().part()
        while waiting:
            yield waiting.popleft().part()


def _begin(
    source: Source, counts: Sequence[int], shards: Sequence[int], batch: int, opener: Executor, pool: Executor
) -> Iterator[_Pending]:
    """Hand part after part to the decoding threads, and open the next shard meanwhile."""
    opening: deque[Future[OpenGroup]] = deque(opener.submit(source.open_group, [shard]) for shard in shards[:1])
    for place, shard in enumerate(shards):
        group = opening.popleft().result()
        opening.extend(opener.submit(source.open_group, [after]) for after in shards[place + 1 : place + 2])
        for start in range(0, max(1, counts[shard]), batch):
            picks = np.arange(start, min(counts[shard], start + batch))
            fields = {name: spec.empty(len(picks)) for name, spec in source.spec.items()}
            tasks = [
                (first, pool.submit(group.read, picks[first : first + _PIECE], fields, first))
                for first in range(0, len(picks), _PIECE)
            ]
            yield _Pending(shard, group, picks, fields, tasks)


@dataclass(frozen=True)
class _Pending:
    """A part whose samples are still being decoded."""

    shard: int
    group: OpenGroup
    picks: NDArray[np.int64]
    fields: Fields
    tasks: list[tuple[int, Future[list[BadPick]]]]

    def part(self) -> ShardPart:
        """Wait for it."""
        bad = [pick._replace(place=first + pick.place) for first, task in self.tasks for pick in task.result()]
        picks, fields = without(bad, self.picks, self.fields)
        return ShardPart(self.shard, len(self.picks), fields, self.group.keys(picks), bad)
