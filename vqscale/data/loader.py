"""Batches without end in the canonical order, decoded ahead in threads; and one exact pass for evaluation."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vqscale.data.bad import BadCount, BadPick
from vqscale.data.order import Group, Packet, StreamOrder, evaluation_shards, flips
from vqscale.data.source import Fields, OpenGroup, Source
from vqscale.errors import UserError

_AHEAD = 3  # batches that are prepared while one is consumed


@dataclass(frozen=True)
class Batch:
    """Samples of one step on one rank."""

    step: int
    fields: Fields
    """Images: `image` uint8 [B, S, S, 3] (NHWC, C-contiguous) and `label` int64 [B]. Codes: for each level
    uint16 [B, side, side], and `label`."""
    index: NDArray[np.int64]
    """int64 [B]: place of each sample in the global batch; in evaluation, number in the whole data set."""


class Loader:
    """Iterates over the `Batch` of steps start_step, start_step + 1, ... of one rank, without end.

    Step t covers the packets [t*M, (t+1)*M), M = global_batch / packet; this rank takes those with
    g % world == rank, in ascending order. A bad sample is replaced by the next good one of its group, so the
    numbering of all others stays. The global batches depend on neither ranks nor threads.

    Args:
        source: where the samples are.
        order: which samples follow each other.
        rank: this rank.
        world: number of ranks.
        global_batch: samples of a step over all ranks.
        threads: threads that decode.
        start_step: the first step to deliver; nothing before it is read.
        error_budget: largest share of bad samples before a `UserError` stops the run.
        flip: mirror the field `image` with probability one half, by (seed, position).
        seed: of the flips.

    Raises:
        UserError: sizes that do not divide; while iterating, unreadable shards or too many bad samples.
    """

    def __init__(
        self,
        source: Source,
        order: StreamOrder,
        *,
        rank: int,
        world: int,
        global_batch: int,
        threads: int = 1,
        start_step: int = 0,
        error_budget: float = 0.001,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        if global_batch % (order.packet * world):
            raise UserError(
                f"global batch {global_batch} is not divisible by {world} ranks × data.packet {order.packet}",
                mend=f"use a multiple of {order.packet * world}",
            )
        self._source, self._order, self._seed, self._flip = source, order, seed, flip
        self._step, self._share = start_step, global_batch // order.packet // world
        self._packets = order.packets(rank, world, start_step * self._share * world)
        self._global_packets = self._share * world
        self._count = BadCount(error_budget)
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="vqscale-decode")
        self._queue: queue.Queue[_Pending | BaseException] = queue.Queue(_AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._prefetch, name="vqscale-prefetch", daemon=True)
        self.wait_s = 0.0
        """Seconds that the consumer has waited for batches."""
        self.bad: Mapping[str, int] = self._count.kinds
        """Bad samples among the delivered batches, by kind."""
        self._thread.start()

    @property
    def bad_samples(self) -> list[tuple[str, str, str]]:
        """(shard, key, kind) of the bad samples, each once."""
        return list(self._count.samples)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closing.is_set():
            raise StopIteration
        began = time.perf_counter()
        try:
            pending = self._queue.get()
            if isinstance(pending, BaseException):
                raise pending
            bad = [pick for task in pending.tasks for pick in task.result()]
            self._count.add(len(pending.batch.index), bad)
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_s += time.perf_counter() - began
        return pending.batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them; may be called again."""
        self._closing.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):  # makes room for a prefetch thread that waits to deliver
                self._queue.get(timeout=0.01)
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _prefetch(self) -> None:
        try:
            groups = _OpenGroups(self._source)
            while not self._closing.is_set():
                self._queue.put(self._begin(groups))
        except BaseException as error:  # re-raised where the batch would have been
            self._queue.put(error)

    def _begin(self, groups: _OpenGroups) -> _Pending:
        """Allocate the next batch and hand its packets to the decoding threads."""
        step, size = self._step, self._order.packet
        fields = {name: spec.empty(self._share * size) for name, spec in self._source.spec.items()}
        index = np.empty(self._share * size, np.int64)
        tasks = []
        for place in range(self._share):
            packet = next(self._packets)
            row, first = place * size, (packet.number - step * self._global_packets) * size
            index[row : row + size] = np.arange(first, first + size)
            tasks.append(self._pool.submit(self._read, packet, groups.of(packet), fields, row))
        self._step += 1
        return _Pending(Batch(step, fields, index), tasks)

    def _read(self, packet: Packet, groups: list[OpenGroup], fields: Fields, row: int) -> list[BadPick]:
        """Read one packet into its rows."""
        bad: list[BadPick] = []
        begin = row
        for part, group in zip(packet.parts, groups, strict=True):
            picks = part.group.picks[part.start : part.stop]
            for found in group.read(picks, fields, row):
                bad.append(found)
                bad.extend(_replace(group, part.group, part.start + found.place, fields, row + found.place))
            row += len(picks)
        if self._flip:
            rows = begin + np.flatnonzero(flips(self._seed, packet.number, row - begin))
            fields["image"][rows] = fields["image"][rows, :, ::-1]
        return bad


@dataclass(frozen=True)
class _Pending:
    """A batch whose packets are still being read."""

    batch: Batch
    tasks: list[Future[list[BadPick]]]


class _OpenGroups:
    """Of each stream the group that is being read (two where groups meet), so that it is opened once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._open: dict[int, list[tuple[Group, OpenGroup]]] = {}

    def of(self, packet: Packet) -> list[OpenGroup]:
        """An open group for each part of the packet."""
        held = self._open.get(packet.stream, [])
        needed = []
        for group in (part.group for part in packet.parts):
            known = [opened for other, opened in held if other is group]
            needed.append((group, known[0] if known else self._source.open_group(group.shards)))
        self._open[packet.stream] = needed
        return [opened for _, opened in needed]


def _replace(opened: OpenGroup, group: Group, position: int, fields: Fields, row: int) -> list[BadPick]:
    """Fill a row with the next good sample of the group; returns the bad ones that were met on the way.

    Only the sample at `position` is counted as replaced; those met on the way are counted where they stand.

    Raises:
        UserError: the group has no good sample.
    """
    for step in range(1, len(group.picks)):
        place = (position + step) % len(group.picks)
        if not opened.read(group.picks[place : place + 1], fields, row):
            return []
    raise UserError(f"none of {len(group.picks)} samples can be read", mend="run `vqscale data verify` on the shards")


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
        error_budget: largest share of bad samples before a `UserError` stops the run.
    """

    def __init__(
        self,
        source: Source,
        counts: Sequence[int],
        rank: int,
        world: int,
        batch: int,
        *,
        error_budget: float = 0.001,
    ) -> None:
        self._source, self._batch = source, batch
        self._counts, self._count = list(counts), BadCount(error_budget)
        self.bad: Mapping[str, int] = self._count.kinds
        """Bad samples so far, by kind."""
        self._shards = evaluation_shards(len(self._counts), rank, world)

    @property
    def samples(self) -> int:
        """Samples of this rank's shards."""
        return sum(self._counts[shard] for shard in self._shards)

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
        for shard in self._shards:
            if not self._counts[shard]:
                continue
            group = self._source.open_group([shard])
            for start in range(0, self._counts[shard], self._batch):
                picks = np.arange(start, min(self._counts[shard], start + self._batch))
                fields = {name: spec.empty(len(picks)) for name, spec in self._source.spec.items()}
                bad = group.read(picks, fields, 0)
                self._count.add(len(picks), bad)
                good = np.delete(np.arange(len(picks)), [pick.place for pick in bad])
                if len(good) < len(picks):
                    fields = {name: values[good] for name, values in fields.items()}
                if len(good):
                    yield fields, starts[shard] + picks[good]


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
