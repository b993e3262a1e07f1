"""An epoch from a real S3 server over a bad network: every byte, and exactly the bad samples."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.data_helpers import image_shards, picture
from tests.fault_proxy import FaultProxy, Faults
from vqscale.data.image_source import ImageSource
from vqscale.data.images import encode_png
from vqscale.data.loader import Loader
from vqscale.data.order import StreamOrder
from vqscale.data.shards import check_shards, open_shards
from vqscale.errors import UserError
from vqscale.storage.access import Access
from vqscale.storage.cache import ShardCache
from vqscale.storage.store import Store

if TYPE_CHECKING:
    from tests.object_store import ObjectStore

pytest_plugins = ("tests.object_store",)

COUNTS = [131, 96, 120, 88, 105, 140, 99, 121, 110, 90, 100, 100]
TOTAL = sum(COUNTS)
BAD = np.random.default_rng(5).choice(TOTAL, round(0.005 * TOTAL), replace=False).tolist()
NETWORK = Faults(unavailable=0.2, reset=0.02, stalls={9: 8.0, 22: 8.0, 29: 8.0}, bytes_per_s=3e6)


@pytest.fixture
def shards(object_store: ObjectStore, tmp_path: Path) -> str:
    """Uneven shards in the bucket, 0.5 % of the images damaged; the URL of their folder."""
    cut = {number: encode_png(picture(number, 24))[:-50] for number in BAD}
    image_shards(tmp_path / "shards", COUNTS, size=24, broken=cut)
    for path in sorted((tmp_path / "shards").iterdir()):
        object_store.put(f"data/{path.name}", path.read_bytes())
    return object_store.url("data")


def epoch(url: str, store: Store, world: int = 1) -> tuple[dict[int, np.ndarray], set[int]]:
    """Images by label over the first epoch, and the numbers of the samples that were counted as bad."""
    found = open_shards(url)
    order = StreamOrder(found.counts, seed=1, streams=4, packet=4, shuffle=150)
    seen: dict[int, np.ndarray] = {}
    bad: set[int] = set()
    for rank in range(world):
        source = ImageSource(found, 24, store)
        with Loader(source, order, rank=rank, world=world, global_batch=16, threads=2, error_budget=0.05) as loader:
            for batch in islice(loader, max(order._epoch_lengths(0))):
                labels, images = batch.fields["label"].tolist(), batch.fields["image"]
                seen |= {label: image.copy() for label, image in zip(labels, images, strict=True)}
            bad |= {int(key) for _, key, _ in loader.bad_samples}
            assert set(loader.bad) == {"corrupt"}
    return seen, bad


@pytest.mark.fault
def test_an_epoch_delivers_every_byte_and_names_the_bad_ones(object_store: ObjectStore, shards: str) -> None:
    store = Store(Access(timeout_s=2.0, block=1 << 18, backoff_s=0.01, longest_backoff_s=0.1))
    with FaultProxy(object_store.port, NETWORK, seed=3) as proxy:
        object_store.use(proxy.port)
        check_shards(open_shards(shards))
        seen, bad = epoch(shards, store)
        assert min(proxy.counts[what] for what in ("unavailable", "reset", "stall")) > 0
    # Which request meets which fault is a matter of order; test_data_faults.py has each kind by itself.
    assert store.retries.keys() & {"status", "reset", "timeout"}
    assert store.mismatched == []
    assert bad == set(BAD)
    # The streams go on to the next epoch on their own; what they left out of the first is in the second.
    missing = set(range(TOTAL)) - set(seen) - bad
    assert len(missing) <= 4 * (4 - 1)
    assert all((image == picture(label, 24)).all() for label, image in seen.items())


@pytest.mark.fault
def test_a_cache_is_shared_and_keeps_an_epoch_from_the_network(
    object_store: ObjectStore, shards: str, tmp_path: Path
) -> None:
    first, second = (Store(Access(), ShardCache(tmp_path / "cache", 1 << 30)) for _ in range(2))
    seen, _ = epoch(shards, first)
    assert first.cache_misses == len(COUNTS)
    again, bad = epoch(shards, second, world=2)
    assert second.cache_misses == second.bytes_read == 0
    assert second.cache_hits >= len(COUNTS)
    assert bad == set(BAD)
    assert set(again) - set(seen) == set(seen) - set(again) == set()


def test_sizes_are_checked_before_anything_starts(object_store: ObjectStore, shards: str, tmp_path: Path) -> None:
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_bytes())
    manifest["shards"][3]["bytes"] += 1
    object_store.put("data/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(UserError, match=r"s3\.tar: shard has \d+ bytes, its manifest says \d+"):
        check_shards(open_shards(shards))
