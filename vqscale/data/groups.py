"""Opening shards ahead of their use, within a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from vqscale.data.order import Group, Packet
from vqscale.data.source import OpenGroup, Source

_Opening = Future[OpenGroup]


class OpenGroups:
    """Iterates over packets together with their open groups.

    While a stream's group is read, its next one is opened in a thread. This holds back when the groups that wait for
    their turn have more bytes than `ahead`; the group that is needed next is always opened.

    Args:
        source: opens the groups.
        packets: this rank's packets.
        threads: groups that are opened at the same time.
        ahead: bytes of shards that may be open before they are needed.
    """

    def __init__(self, source: Source, packets: Iterator[Packet], *, threads: int, ahead: int) -> None:
        self._source, self._packets, self._ahead = source, packets, ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vqscale-open")
        self._queue: deque[Packet] = deque()
        self._held: Packet | None = None  # taken from the order, but its group must not be opened yet
        self._waiting: dict[int, list[Group]] = {}  # stream → groups that are opened before their first packet is due
        self._current: dict[int, list[Group]] = {}  # stream → groups of its last packet
        self._open: dict[int, _Opening] = {}  # by id of a group, all of which are in one of the two

    def __iter__(self) -> Iterator[tuple[Packet, list[OpenGroup]]]:
        return self

    def __next__(self) -> tuple[Packet, list[OpenGroup]]:
        self._look_ahead()
        packet = self._queue.popleft()
        groups = [part.group for part in packet.parts]
        self._settle(packet.stream, groups)
        return packet, [self._open[id(group)].result() for group in groups]

    def close(self) -> None:
        """Give up what is being opened."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _look_ahead(self) -> None:
        while True:
            packet = self._held or next(self._packets)
            self._held = None
            fresh = [part.group for part in packet.parts if id(part.group) not in self._open]
            if fresh and self._queue and not self._may_open(packet.stream, fresh):
                self._held = packet
                return
            for group in fresh:
                self._open[id(group)] = self._pool.submit(self._source.open_group, group.shards)
                self._waiting.setdefault(packet.stream, []).append(group)
            self._queue.append(packet)

    def _may_open(self, stream: int, fresh: list[Group]) -> bool:
        """Of each stream one group beyond the one that is read, and all that wait within the bound."""
        if self._waiting.get(stream):
            return False
        waiting = [group for groups in self._waiting.values() for group in groups]
        return sum(self._source.bytes_of(group.shards) for group in [*waiting, *fresh]) <= self._ahead

    def _settle(self, stream: int, groups: list[Group]) -> None:
        """A stream moves on: what its packet needs is current, what it had before is let go."""
        waiting = self._waiting.get(stream, [])
        self._waiting[stream] = [group for group in waiting if all(group is not needed for needed in groups)]
        for group in self._current.get(stream, []):
            if all(group is not needed for needed in groups):
                del self._open[id(group)]
        self._current[stream] = groups
