"""Batches without end in the canonical order, shards opened and samples decoded ahead in threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vqscale.data.bad import BadCount, BadPick
from vqscale.data.buffers import Allocate, BatchBuffers
from vqscale.data.groups import OpenGroups
from vqscale.data.memory import aligned
from vqscale.data.order import Group, Packet, StreamOrder, flips
from vqscale.data.source import Fields, OpenGroup, Source
from vqscale.errors import UserError

_AHEAD = 3  # batches that are prepared while one is consumed
_TRIED = 10_000  # samples that are tried to replace a bad one


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
    g % world == rank, in ascending order. A bad sample is replaced by the next good one of its group (of the shards
    after it where the group has none), so the numbering of all others stays. The global batches depend on neither
    ranks nor threads.

    A batch's arrays are used again once nothing refers to them; who holds a batch keeps it.

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
        openers: threads that open shards ahead of their use.
        ahead: bytes of shards that may be open before they are needed.
        allocate: makes the batches' arrays, for example in pinned memory.

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
        openers: int = 2,
        ahead: int = 1 << 30,
        allocate: Allocate = aligned,
    ) -> None:
        if global_batch % (order.packet * world):
            raise UserError(
                f"global batch {global_batch} is not divisible by {world} ranks × data.packet {order.packet}",
                mend=f"use a multiple of {order.packet * world}",
            )
        self._source, self._order, self._seed, self._flip = source, order, seed, flip
        self._step, self._share = start_step, global_batch // order.packet // world
        self._global_packets = self._share * world
        packets = order.packets(rank, world, start_step * self._global_packets)
        self._groups = OpenGroups(source, packets, threads=openers, ahead=ahead)
        self._buffers = BatchBuffers(source.spec, self._share * order.packet, allocate)
        self._count = BadCount(error_budget, world)
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
    def read(self) -> int:
        """Samples of the delivered batches."""
        return self._count.read

    @property
    def bad_samples(self) -> list[tuple[str, str, str]]:
        """(shard, key, kind) of the bad samples, each once, in the order in which they were met."""
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
        self._groups.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _prefetch(self) -> None:
        try:
            while not self._closing.is_set():
                self._queue.put(self._begin())
        except BaseException as error:  # re-raised where the batch would have been
            self._queue.put(error)

    def _begin(self) -> _Pending:
        """Take memory for the next batch and hand its packets to the decoding threads."""
        step, size = self._step, self._order.packet
        fields = self._buffers.take()
        index = np.empty(self._share * size, np.int64)
        tasks = []
        for place in range(self._share):
            packet, groups = next(self._groups)
            row, first = place * size, (packet.number - step * self._global_packets) * size
            index[row : row + size] = np.arange(first, first + size)
            tasks.append(self._pool.submit(self._read, packet, groups, fields, row))
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
                self._replace(group, part.group, part.start + found.place, fields, row + found.place)
            row += len(picks)
        if self._flip:
            rows = begin + np.flatnonzero(flips(self._seed, packet.number, row - begin))
            fields["image"][rows] = fields["image"][rows, :, ::-1]
        return bad

    def _replace(self, opened: OpenGroup, group: Group, position: int, fields: Fields, row: int) -> None:
        """Fill a row with the next good sample. Bad ones that are met on the way are counted where they stand.

        Raises:
            UserError: there is no good one.
        """
        for candidates, pick in islice(self._candidates(opened, group, position), _TRIED):
            if not candidates.read(np.array([pick]), fields, row):
                return
        raise UserError("too many samples in a row cannot be read", mend="run `vqscale data verify` on the shards")

    def _candidates(self, opened: OpenGroup, group: Group, position: int) -> Iterator[tuple[OpenGroup, int]]:
        """The rest of the group, its beginning, then the shards after it: the same on every rank."""
        for pick in (*group.picks[position + 1 :].tolist(), *group.picks[:position].tolist()):
            yield opened, pick
        counts = self._order.counts
        for step in range(1, len(counts)):
            shard = (group.shards[-1] + step) % len(counts)
            if counts[shard] and shard not in group.shards:
                other = self._source.open_group([shard])
                for pick in range(counts[shard]):
                    yield other, pick


@dataclass(frozen=True)
class _Pending:
    """A batch whose packets are still being read."""

    batch: Batch
    tasks: list[Future[list[BadPick]]]
