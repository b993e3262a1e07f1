"""Reading ahead: all samples in order, the same parts for any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from vqscale.data.ahead import ShardPart, read_ahead
from vqscale.data.bad import BadPick
from vqscale.data.source import Fields, Spec
from vqscale.errors import UserError
from vqscale.storage.store import Store

COUNTS = [40, 0, 7, 33]
BAD = {(0, 3), (0, 20), (3, 32)}


class Numbers:
    """A source whose samples are (shard, number); some are bad, and shard 9 cannot be opened."""

    def __init__(self) -> None:
        self.spec = {"at": Spec((2,), np.dtype(np.int64))}
        self.store = Store()
        self.threads: set[str] = set()
        self.reached = {shard: threading.Event() for shard in range(4)}

    def name(self, shard: int) -> str:
        return f"s{shard}"

    def bytes_of(self, shards: Sequence[int]) -> int:
        return 0

    def open_group(self, shards: Sequence[int]) -> Group:
        if shards[0] == 9:
            raise UserError("no such file", where="s9")
        return Group(self, shards[0])


class Group:
    def __init__(self, source: Numbers, shard: int) -> None:
        self._source, self._shard = source, shard

    def keys(self, picks: NDArray[np.int64]) -> list[str]:
        return [f"{self._shard}-{pick}" for pick in picks.tolist()]

    def read(self, picks: NDArray[np.int64], out: Fields, row: int) -> list[BadPick]:
        self._source.threads.add(threading.current_thread().name)
        self._source.reached[self._shard].set()
        out["at"][row : row + len(picks)] = [(self._shard, pick) for pick in picks.tolist()]
        bad = [(place, pick) for place, pick in enumerate(picks.tolist()) if (self._shard, pick) in BAD]
        return [BadPick(place, f"s{self._shard}", f"{self._shard}-{pick}", "corrupt") for place, pick in bad]


def parts(threads: int, batch: int = 18, shards: Sequence[int] = (0, 1, 2, 3)) -> list[ShardPart]:
    return list(read_ahead(Numbers(), COUNTS, shards, batch=batch, threads=threads))


def test_every_good_sample_is_there_once_and_in_order() -> None:
    found = parts(threads=3)
    assert [(part.shard, part.read) for part in found] == [(0, 18), (0, 18), (0, 4), (1, 0), (2, 7), (3, 18), (3, 15)]
    good = [(shard, n) for shard in (0, 2, 3) for n in range(COUNTS[shard]) if (shard, n) not in BAD]
    assert np.concatenate([part.fields["at"] for part in found]).tolist() == [list(pair) for pair in good]
    assert [key for part in found for key in part.keys] == [f"{shard}-{n}" for shard, n in good]
    assert [[(pick.place, pick.key) for pick in part.bad] for part in found if part.bad] == [
        [(3, "0-3")],
        [(2, "0-20")],
        [(14, "3-32")],
    ]


def test_parts_do_not_depend_on_threads() -> None:
    one, many = parts(threads=1), parts(threads=7)
    for ours, theirs in zip(one, many, strict=True):
        assert (ours.shard, ours.read, ours.keys, ours.bad) == (theirs.shard, theirs.read, theirs.keys, theirs.bad)
        assert (ours.fields["at"] == theirs.fields["at"]).all()


def test_samples_are_decoded_before_they_are_asked_for_and_elsewhere() -> None:
    source = Numbers()
    reading = read_ahead(source, COUNTS, [2, 0], batch=18, threads=2)
    assert next(reading).shard == 2
    assert source.reached[0].wait(30)
    reading.close()
    assert all(name.startswith("vqscale-ahead") for name in source.threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vqscale-ahead")]


def test_a_shard_that_cannot_be_opened_is_named() -> None:
    counts = [*COUNTS, 0, 0, 0, 0, 0, 5]
    reading = read_ahead(Numbers(), counts, [2, 9], batch=18, threads=1)
    with pytest.raises(UserError, match="s9: no such file"):
        list(reading)
    assert list(read_ahead(Numbers(), COUNTS, [], batch=18, threads=1)) == []
