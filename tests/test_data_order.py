from collections import Counter
from itertools import islice

import numpy as np
import pytest

from vqscale.data.order import StreamOrder, evaluation_shards, flips
from vqscale.errors import UserError

COUNTS = [31, 40, 25, 38, 29, 40, 33, 21, 40, 37, 36, 22, 30, 40, 28, 5, 40, 19]


def order(**changes) -> StreamOrder:
    settings = {"seed": 3, "streams": 12, "packet": 4, "shuffle": 50, **changes}
    return StreamOrder(settings.pop("counts", COUNTS), **settings)


def merged(world: int, packets: int, start: int = 0, **changes) -> list[tuple]:
    """Packets of all ranks together, by number."""
    found = {}
    for rank in range(world):
        for packet in order(**changes).packets(rank, world, start):
            if packet.number >= start + packets:
                break
            assert packet.number % world == rank
            found[packet.number] = (packet.epoch, *packet.samples())
    assert sorted(found) == list(range(start, start + packets))
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("world", [2, 3, 4, 6, 12])
def test_same_packets_for_every_world(world: int):
    assert merged(world, 480) == merged(1, 480)  # over three epochs


def test_resumes_at_any_packet_on_any_world():
    whole = merged(1, 500)
    rng = np.random.default_rng(0)
    for start in rng.integers(0, 480, 20).tolist():
        world = int(rng.choice([1, 2, 3, 4, 6, 12]))
        assert merged(world, 20, start) == whole[start : start + 20]


def test_an_epoch_holds_each_sample_once_but_for_the_remainder():
    by_epoch: dict[int, Counter] = {}
    for packet in islice(order().packets(0, 1), 700):
        by_epoch.setdefault(packet.epoch, Counter()).update(packet.samples())
    everything = {(shard, index) for shard, count in enumerate(COUNTS) for index in range(count)}
    left_out = []
    for epoch in range(3):
        seen = by_epoch[epoch]
        assert max(seen.values()) == 1
        assert seen.keys() <= everything
        left_out.append(everything - seen.keys())
        assert len(left_out[-1]) <= 12 * (4 - 1)
    assert left_out[0] != left_out[1]


def test_each_epoch_is_ordered_and_dealt_anew():
    dealt = [order()._deal(epoch) for epoch in range(3)]
    assert dealt[0] != dealt[1] != dealt[2]
    company = [{frozenset(shards) for shards in epoch} for epoch in dealt]
    assert company[0] != company[1]  # of unlike shards too
    firsts = [next(order().packets(0, 1, start)).samples() for start in (0, 12)]
    assert firsts[0] != firsts[1]


def test_streams_are_balanced():
    loads = [sum(COUNTS[shard] for shard in shards) for shards in order(streams=3)._deal(0)]
    assert max(loads) - min(loads) <= max(COUNTS)


def test_samples_are_mixed_within_the_radius():
    packet = next(order(counts=[100] * 12, shuffle=1).packets(0, 1))
    assert len({shard for shard, _ in packet.samples()}) == 1
    mixed = order(counts=[10] * 120, shuffle=100)
    shards = {shard for packet in islice(mixed.packets(0, 12), 10) for shard, _ in packet.samples()}
    assert len(shards) == 10


def test_seed_decides():
    assert merged(1, 20, seed=4) != merged(1, 20)
    assert merged(1, 20, seed=-4) == merged(1, 20, seed=-4)


def test_1024_ranks_cover_an_epoch_up_to_the_stated_remainder():
    rng = np.random.default_rng(0)
    counts = rng.integers(20, 61, 4096).tolist()
    big = StreamOrder(counts, seed=1, streams=1024, packet=8, shuffle=100)
    seen: Counter = Counter()
    for rank in range(1024):
        for packet in big.packets(rank, 1024):
            if packet.epoch:
                break
            assert packet.stream == rank
            seen.update(packet.samples())
    assert max(seen.values()) == 1
    left_out = [sum(counts[shard] for shard in shards) % 8 for shards in big._deal(0)]
    assert sum(counts) - len(seen) == sum(left_out)  # what fills no packet, at most 7 a stream


def test_1024_ranks_have_about_the_same_to_read():
    counts = np.random.default_rng(0).integers(20, 61, 16_384).tolist()
    loads = [
        sum(counts[shard] for shard in shards)
        for shards in StreamOrder(counts, seed=1, streams=1024, packet=8, shuffle=100)._deal(0)
    ]
    assert (max(loads) - min(loads)) / np.mean(loads) < 0.05


def test_far_positions_are_reached_without_reading():
    packet = next(order().packets(0, 1, 400_000))
    assert packet.number == 400_000
    assert packet.epoch > 2_000


def test_conditions_name_the_mend():
    with pytest.raises(UserError, match=r"12 streams cannot be shared by 5 ranks.*multiple of 5"):
        order().packets(0, 5)
    with pytest.raises(UserError, match="18 shards cannot feed 24 streams"):
        order(streams=24)
    with pytest.raises(UserError, match=r"packet of 64"):
        order(packet=64)


def test_flips_depend_on_seed_and_packet():
    assert (flips(1, 5, 64) == flips(1, 5, 64)).all()
    assert (flips(1, 5, 64) != flips(1, 6, 64)).any()
    assert 400 < sum(flips(1, number, 1)[0] for number in range(1000)) < 600


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_shards_are_disjoint_and_complete(world: int):
    shards = [shard for rank in range(world) for shard in evaluation_shards(5, rank, world)]
    assert sorted(shards) == list(range(5))
