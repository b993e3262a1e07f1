"""The store opens shards from anywhere, once for all threads, compares them with their hash, and counts."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from tests.fault_proxy import FaultProxy, Faults
from vqscale.errors import UserError
from vqscale.storage.access import Access
from vqscale.storage.cache import ShardCache
from vqscale.storage.store import Store

if TYPE_CHECKING:  # the plugin is imported by pytest
    from tests.object_store import ObjectStore

pytest_plugins = ("tests.object_store",)

DATA = random.Random(1).randbytes(300_000)
QUICK = Access(block=1 << 17, backoff_s=0.005, longest_backoff_s=0.02)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def in_memory(name: str, data: bytes) -> str:
    fsspec.filesystem("memory").pipe_file(f"/store/{name}", data)
    return f"memory://store/{name}"


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_local_shards_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    store = Store()
    assert store.open(str(tmp_path / "a.tar"))[:] == DATA
    assert (store.bytes_read, store.cache_misses) == (0, 0)


def test_without_a_cache_shards_lie_in_memory() -> None:
    store = Store(QUICK)
    buffer = store.open(in_memory("a.tar", DATA), sha256=sha256(DATA), size=len(DATA))
    assert buffer[:] == DATA
    assert isinstance(buffer[3:5], bytes)
    assert (store.bytes_read, store.mismatched) == (len(DATA), [])


@pytest.mark.parametrize("hashed", [True, False])
def test_a_kept_shard_is_not_read_again(tmp_path: Path, hashed: bool) -> None:
    url, known = in_memory("a.tar", DATA), sha256(DATA) if hashed else ""
    store = Store(QUICK, ShardCache(tmp_path, 1 << 20))
    for _ in range(3):
        assert store.open(url, sha256=known)[:] == DATA
    assert (store.cache_misses, store.cache_hits, store.bytes_read) == (1, 2, len(DATA))
    assert len(kept(tmp_path)) == 1
    if hashed:
        assert kept(tmp_path) == [f"{known}.shard"]


def test_the_same_name_in_two_folders_is_two_shards(tmp_path: Path) -> None:
    store = Store(QUICK, ShardCache(tmp_path, 1 << 20))
    train, validation = in_memory("train/0000.tar", b"train"), in_memory("validation/0000.tar", b"other")
    assert (store.open(train)[:], store.open(validation)[:]) == (b"train", b"other")
    assert (store.open(train)[:], store.open(validation)[:]) == (b"train", b"other")
    assert store.cache_hits == 2


def test_the_same_content_in_two_places_is_kept_once(tmp_path: Path) -> None:
    store = Store(QUICK, ShardCache(tmp_path, 1 << 20))
    for name in ("here.tar", "there.tar"):
        assert store.open(in_memory(name, DATA), sha256=sha256(DATA))[:] == DATA
    assert store.bytes_read == len(DATA)


def test_without_a_hash_a_new_version_is_read_anew(object_store: ObjectStore, tmp_path: Path) -> None:
    store = Store(QUICK, ShardCache(tmp_path, 1 << 20))
    for content in (b"first", b"later"):
        assert store.open(object_store.put("a.tar", content))[:] == content


def test_an_empty_shard(tmp_path: Path) -> None:
    for cache in (None, ShardCache(tmp_path, 10)):
        assert Store(QUICK, cache).open(in_memory("empty.tar", b""), sha256=sha256(b""))[:] == b""


@pytest.mark.parametrize("cached", [True, False])
def test_content_that_differs_is_used_and_reported_but_not_kept(tmp_path: Path, cached: bool) -> None:
    cache = ShardCache(tmp_path, 1 << 20) if cached else None
    reported: list[str] = []
    store = Store(QUICK, cache, reported.append)
    url = in_memory("flipped.tar", DATA)
    assert store.open(url, sha256=sha256(b"what it should be"))[:] == DATA
    assert store.mismatched == reported == [url]
    assert store.bytes_read == 2 * len(DATA)  # it might have been the network
    assert kept(tmp_path) == []
    assert store.open(url, sha256=sha256(b"what it should be"))[:] == DATA
    assert (store.mismatched, store.bytes_read) == ([url], 3 * len(DATA))


def test_content_that_differs_once_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = in_memory("a.tar", DATA)
    system = type(fsspec.filesystem("memory"))
    read, flips = system.cat_file, [1]

    def flip_once(self: Any, path: str, start: int, end: int) -> bytes:
        found = read(self, path, start, end)
        return bytes([found[0] ^ flips.pop()]) + found[1:] if flips else found

    monkeypatch.setattr(system, "cat_file", flip_once)
    store = Store(QUICK, ShardCache(tmp_path, 1 << 20))
    assert store.open(url, sha256=sha256(DATA))[:] == DATA
    assert (store.mismatched, store.bytes_read) == ([], 2 * len(DATA))
    assert kept(tmp_path) == [f"{sha256(DATA)}.shard"]


@pytest.mark.parametrize("cached", [True, False])
def test_threads_that_want_the_same_shard_share_one_download(
    object_store: ObjectStore, tmp_path: Path, cached: bool
) -> None:
    url, found = object_store.put("a.tar", DATA), []
    with FaultProxy(object_store.port, Faults(latency_s=0.05)) as proxy:
        object_store.use(proxy.port)
        store = Store(QUICK, ShardCache(tmp_path, 1 << 20) if cached else None)
        together = threading.Barrier(8)

        def work() -> None:
            together.wait()
            found.append(store.open(url, sha256=sha256(DATA))[:] == DATA)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 8
    assert store.bytes_read == len(DATA)


def test_all_threads_hear_of_a_failure(object_store: ObjectStore) -> None:
    store, said, together = Store(QUICK), [], threading.Barrier(4)

    def work() -> None:
        together.wait()
        with pytest.raises(UserError, match="no such file"):
            store.open(object_store.url("nothing.tar"))
        said.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 4


@pytest.mark.fault
def test_a_bad_network_is_counted(object_store: ObjectStore, tmp_path: Path) -> None:
    url = object_store.put("a.tar", DATA)
    with FaultProxy(object_store.port, Faults(unavailable=0.4), seed=2) as proxy:
        object_store.use(proxy.port)
        store = Store(Access(block=1 << 16, connections=1, backoff_s=0.005), ShardCache(tmp_path, 1 << 20))
        assert store.open(url, sha256=sha256(DATA))[:] == DATA
    assert proxy.counts["unavailable"] > 0
    assert store.retries == {"status": proxy.counts["unavailable"]}
