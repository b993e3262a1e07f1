"""Memory of batches that is used again, and shards that are opened ahead."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytest
import torch

from vqscale.data.buffers import BatchBuffers
from vqscale.data.groups import OpenGroups
from vqscale.data.memory import aligned
from vqscale.data.order import StreamOrder
from vqscale.data.source import Spec

SPEC = {"image": Spec((4, 4, 3), np.dtype(np.uint8)), "label": Spec((), np.dtype(np.int64))}
COUNTS = [30, 32, 28, 30, 34, 26, 30, 31, 29, 30, 33, 27]


@pytest.mark.parametrize(("shape", "dtype"), [((3, 5, 5), np.uint16), ((7,), np.int64), ((0, 4), np.uint8)])
def test_memory_begins_at_a_cache_line(shape: tuple[int, ...], dtype: type):
    made = [aligned(shape, dtype) for _ in range(20)]
    assert {array.ctypes.data % 64 for array in made} == {0}
    for number, array in enumerate(made):
        array.fill(number)
    assert all((array == number).all() and array.flags.c_contiguous for number, array in enumerate(made))
    assert (made[0].shape, made[0].dtype) == (shape, dtype)


def test_memory_is_used_again_once_nobody_holds_it():
    buffers = BatchBuffers(SPEC, 2)
    first = buffers.take()
    place = first["image"].ctypes.data
    del first
    assert buffers.take()["image"].ctypes.data == place


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array,
        lambda array: array[1:],
        lambda array: array[0].reshape(-1)[::2],
        torch.from_numpy,
        lambda array: torch.from_numpy(array).permute(0, 3, 1, 2)[1],
        memoryview,
    ],
    ids=["array", "view", "view of a view", "tensor", "view of a tensor", "memoryview"],
)
def test_memory_is_left_alone_while_anybody_holds_it(hold):
    buffers = BatchBuffers(SPEC, 2)
    first = buffers.take()
    place, held = first["image"].ctypes.data, hold(first["image"])
    del first
    assert buffers.take()["image"].ctypes.data != place
    del held
    assert buffers.take()["image"].ctypes.data == place


def test_fields_of_one_batch_are_apart_and_allocated_as_told():
    asked = []

    def allocate(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        asked.append((shape, dtype))
        return np.empty(shape, dtype)

    buffers = BatchBuffers(SPEC, 5, allocate)
    one, two = buffers.take(), buffers.take()
    assert one["label"].shape == (5,)
    assert one["label"] is not two["label"]
    assert asked == [((5, 4, 4, 3), np.uint8), ((5,), np.int64)] * 2


class Shards:
    """A source that notes what is opened; a gate holds the opening of what it names."""

    def __init__(self, *gated: int) -> None:
        self.opened: list[int] = []
        self.gate, self._gated = threading.Event(), set(gated)

    def bytes_of(self, shards: Sequence[int]) -> int:
        return 100 * len(shards)

    def open_group(self, shards: Sequence[int]) -> tuple[int, ...]:
        if self._gated & set(shards):
            assert self.gate.wait(20)
        self.opened.extend(shards)
        return tuple(shards)


def groups_of(source: Shards, *, streams: int = 4, ahead: int, packets: int = 200) -> list[tuple]:
    order = StreamOrder(COUNTS, seed=1, streams=streams, packet=4, shuffle=1)
    opened = OpenGroups(source, order.packets(0, 1), threads=2, ahead=ahead)  # type: ignore[arg-type]
    try:
        return [(packet, groups) for packet, groups in islice(opened, packets)]
    finally:
        opened.close()


@pytest.mark.parametrize("ahead", [0, 150, 10_000])
def test_each_packet_comes_with_its_groups(ahead: int):
    for packet, groups in groups_of(Shards(), ahead=ahead):
        assert groups == [part.group.shards for part in packet.parts]


@pytest.mark.parametrize("ahead", [0, 10_000])
def test_a_shard_is_opened_once_an_epoch(ahead: int):
    source = Shards()
    packets = groups_of(source, ahead=ahead)
    epochs = max(packet.epoch for packet, _ in packets) + 1
    opened = [source.opened.count(shard) for shard in range(len(COUNTS))]
    assert max(opened) <= epochs + (1 if ahead else 0)  # the next epoch's may be open already
    assert min(opened) >= epochs - 1


def test_nothing_is_opened_ahead_without_leave():
    source = Shards()
    packets = groups_of(source, ahead=0, packets=4)
    assert sorted(source.opened) == sorted(
        shard for packet, _ in packets for part in packet.parts for shard in part.group.shards
    )


def test_the_next_group_is_opened_while_this_one_is_read():
    order = StreamOrder(COUNTS, seed=1, streams=1, packet=4, shuffle=1)
    first, second = order._deal(0)[0][:2]
    source = Shards(second)
    opened = OpenGroups(source, order.packets(0, 1), threads=2, ahead=100)  # type: ignore[arg-type]
    try:
        whole = COUNTS[first] // 4
        for packet, groups in islice(opened, whole):  # goes on although the second shard does not open yet
            assert groups[0] == (first,)
            assert packet.stream == 0
        source.gate.set()
        assert next(opened)[1][-1] == (second,)
    finally:
        source.gate.set()
        opened.close()


def test_faults_of_an_opener_come_with_the_packet():
    class Broken(Shards):
        def open_group(self, shards: Sequence[int]) -> tuple[int, ...]:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        groups_of(Broken(), ahead=1000)
