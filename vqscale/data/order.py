"""The canonical order of samples: a pure function of (seed, position), the same for every number of ranks.

There are C streams. In each epoch a seeded permutation of the shards is dealt to the streams, balanced by
sample count. A stream reads its shards in groups that hold at least the shuffle radius; the samples of a
group are permuted. Samples leave a stream in packets: packet g of the whole job is packet g // C of stream
g % C, and rank r of W reads the packets with g % W == r, so each stream belongs to one rank. Streams go on to
their next epoch on their own and never end; up to packet - 1 samples a stream, other ones each time, are left
out of an epoch. The whole state of reading is one integer, the next g: what lies before it is skipped by
arithmetic over the counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vqscale.data.manifest import check_streams, deal
from vqscale.errors import UserError

_DEAL, _GROUP, _FLIP = 1, 2, 3  # what a generator is for; keeps their draws apart


@dataclass(frozen=True, eq=False)
class Group:
    """Shards that are shuffled together."""

    shards: tuple[int, ...]
    """Numbers of the shards, in the order in which their samples are counted."""
    starts: NDArray[np.int64]
    """int64 [shards]: number of each shard's first sample within the group."""
    picks: NDArray[np.int64]
    """int64 [samples]: the permutation, by number within the group."""

    def locate(self, pick: int) -> tuple[int, int]:
        """Shard, and index within it, of a sample of the group."""
        place = int(np.searchsorted(self.starts, pick, side="right")) - 1
        return self.shards[place], int(pick - self.starts[place])


@dataclass(frozen=True)
class Part:
    """Consecutive samples `group.picks[start:stop]`."""

    group: Group
    start: int
    stop: int


@dataclass(frozen=True)
class Packet:
    """Samples that are read together from one stream; one part, or more where groups meet."""

    number: int
    """g, over the whole job."""
    stream: int
    epoch: int
    """The stream's epoch."""
    parts: tuple[Part, ...]

    def samples(self) -> list[tuple[int, int]]:
        """(shard, index) of each sample, in order."""
        return [part.group.locate(pick) for part in self.parts for pick in part.group.picks[part.start : part.stop]]


class StreamOrder:
    """Which samples every packet holds.

    Args:
        counts: samples of each shard, from the manifest.
        seed: any integer; another seed is another order.
        streams: canonical streams C; ranks must divide it.
        packet: samples of a packet.
        shuffle: shuffle radius in samples; 1 permutes within single shards.
        where: names the shards in errors.

    Raises:
        UserError: fewer shards than streams, or too few samples in them.
    """

    def __init__(
        self, counts: Sequence[int], *, seed: int, streams: int, packet: int, shuffle: int, where: str = ""
    ) -> None:
        check_streams(counts, streams=streams, packet=packet, where=where)
        self.counts = tuple(int(count) for count in counts)
        self.seed, self.streams, self.packet, self.shuffle = seed, streams, packet, shuffle
        self._deal = lru_cache(maxsize=4)(self._deal_epoch)
        self._lengths = lru_cache(maxsize=None)(self._epoch_lengths)  # a few numbers an epoch, for skipping

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(self.counts)

    def packets(self, rank: int, world: int, start: int = 0) -> Iterator[Packet]:
        """The packets of one rank, without end.

        Args:
            rank: 0 to world - 1.
            world: number of ranks.
            start: the first packet number that counts; earlier ones are skipped unread.

        Raises:
            UserError: the streams cannot be shared evenly by the ranks.
        """
        if self.streams % world:
            raise UserError(
                f"{self.streams} streams cannot be shared by {world} ranks",
                where="data.streams",
                mend=f"use a multiple of {world}",
            )
        return self._packets(rank, world, start)

    def _packets(self, rank: int, world: int, start: int) -> Iterator[Packet]:
        readers: dict[int, Iterator[tuple[int, tuple[Part, ...]]]] = {}
        number = start + (rank - start) % world
        while True:
            stream = number % self.streams
            if stream not in readers:
                readers[stream] = self._stream(stream, number // self.streams)
            epoch, parts = next(readers[stream])
            yield Packet(number, stream, epoch, parts)
            number += world

    def _stream(self, stream: int, skip: int) -> Iterator[tuple[int, tuple[Part, ...]]]:
        """Epoch and parts of each packet of a stream, the first `skip` packets left out."""
        epoch = 0
        while True:
            packets = self._lengths(epoch)[stream]
            if skip < packets:
                for parts in self._epoch(epoch, stream, range(skip, packets)):
                    yield epoch, parts
            skip = max(0, skip - packets)
            epoch += 1

    def _epoch_lengths(self, epoch: int) -> list[int]:
        """Packets of each stream in an epoch."""
        return [sum(self.counts[shard] for shard in shards) // self.packet for shards in self._deal(epoch)]

    def _deal_epoch(self, epoch: int) -> list[list[int]]:
        """Shards of each stream in an epoch.

        Large shards are dealt first, which balances the streams; the sizes are blurred by a quarter, so that
        shards of unlike size meet in new company each epoch too. Equal ones are dealt in a plain permutation.
        """
        rng = generator(self.seed, _DEAL, epoch)
        counts = np.asarray(self.counts)
        order = rng.permutation(np.flatnonzero(counts))
        if counts[order].min() < counts[order].max():
            order = order[np.argsort(-counts[order] * rng.uniform(0.75, 1.25, len(order)), kind="stable")]
        dealt = deal(order.tolist(), self.counts, self.streams)
        places = rng.permutation(self.streams)
        return [[dealt[place][k] for k in rng.permutation(len(dealt[place]))] for place in places]

    def _epoch(self, epoch: int, stream: int, packets: range) -> Iterator[tuple[Part, ...]]:
        groups = self._groups(self._deal(epoch)[stream])
        ends = np.cumsum([sum(self.counts[shard] for shard in group) for group in groups])
        place = int(np.searchsorted(ends, packets.start * self.packet, side="right"))
        group = self._permuted(epoch, stream, place, groups[place])
        for packet in packets:
            parts, position, stop = [], packet * self.packet, (packet + 1) * self.packet
            while position < stop:
                if position == ends[place]:
                    place += 1
                    group = self._permuted(epoch, stream, place, groups[place])
                first = int(ends[place]) - len(group.picks)
                until = min(stop, int(ends[place]))
                parts.append(Part(group, position - first, until - first))
                position = until
            yield tuple(parts)

    def _groups(self, shards: list[int]) -> list[list[int]]:
        groups: list[list[int]] = []
        held = self.shuffle
        for shard in shards:
            if held >= self.shuffle:
                groups.append([])
                held = 0
            groups[-1].append(shard)
            held += self.counts[shard]
        return groups

    def _permuted(self, epoch: int, stream: int, place: int, shards: list[int]) -> Group:
        counts = np.array([self.counts[shard] for shard in shards], dtype=np.int64)
        picks = generator(self.seed, _GROUP, epoch, stream, place).permutation(int(counts.sum()))
        return Group(tuple(shards), np.cumsum(counts) - counts, picks)


def generator(seed: int, *key: int) -> np.random.Generator:
    """A generator that depends on (seed, key) alone; seeds may be negative."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed % 2**64, *key))))


def flips(seed: int, packet: int, samples: int) -> NDArray[np.bool_]:
    """Which samples of a packet are mirrored, bool [samples]; depends on seed and packet number alone."""
    return generator(seed, _FLIP, packet).random(samples) < 0.5


def evaluation_shards(shards: int, rank: int, world: int) -> range:
    """Numbers of the shards that a rank evaluates; over all ranks every shard is there once."""
    return range(rank, shards, world)
