"""The cache keeps shards by content, for many processes, within its limit."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from tests.fault_proxy import FaultProxy, Faults
from tests.ranks import LIMIT_S
from tests.waiting import until
from vqscale import storage
from vqscale.errors import UserError
from vqscale.storage.access import Access
from vqscale.storage.cache import Draft, ShardCache, url_key
from vqscale.storage.store import Store

if TYPE_CHECKING:  # the plugin is imported by pytest
    from tests.object_store import ObjectStore

pytest_plugins = ("tests.object_store",)

DATA = random.Random(1).randbytes(300_000)
QUICK = Access(block=1 << 17, backoff_s=0.005, longest_backoff_s=0.02)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def in_memory(name: str, data: bytes) -> str:
    fsspec.filesystem("memory").pipe_file(f"/cache/{name}", data)
    return f"memory://cache/{name}"


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill_with(data: bytes) -> Any:
    def fill(draft: Draft) -> bool:
        draft.write(0, data)
        return True

    return fill


@contextmanager
def processes(target: Any, arguments: list[tuple[Any, ...]]) -> Iterator[list[BaseProcess]]:
    """Children that are always reaped."""
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=target, args=each, daemon=True) for each in arguments]
    try:
        for child in children:
            child.start()
        yield list(children)
    finally:
        for child in children:
            child.kill()
            child.join()


# --- several processes


def open_in_child(folder: Path, urls: list[str], hashes: list[str]) -> None:
    store = Store(QUICK, ShardCache(folder, 1 << 22))
    for url, known in zip(urls, hashes, strict=True):
        assert sha256(store.open(url, sha256=known)[:]) == known


@pytest.mark.dist
def test_many_processes_download_once(object_store: ObjectStore, tmp_path: Path) -> None:
    contents = [DATA, DATA[::-1], DATA[1:]]
    with FaultProxy(object_store.port, Faults(latency_s=0.05)) as proxy:
        object_store.use(proxy.port)
        urls = [object_store.put(f"{number}.tar", content) for number, content in enumerate(contents)]
        arguments = (tmp_path, urls, [sha256(content) for content in contents])
        with processes(open_in_child, [arguments] * 4) as children:
            for child in children:
                child.join(LIMIT_S)
            assert [child.exitcode for child in children] == [0] * 4
    gets = [line for line in proxy.requests if line.startswith("GET")]
    assert len(gets) == sum(-(-len(content) // QUICK.block) for content in contents)
    assert kept(tmp_path) == sorted(f"{sha256(content)}.shard" for content in contents)


def hold(folder: Path, key: str, begun: Path) -> None:
    def fill(draft: Draft) -> bool:
        draft.write(0, b"half")
        begun.touch()
        signal.pause()
        return True

    ShardCache(folder, 1 << 20).open(key, 1000, fill)


@pytest.mark.fault
@pytest.mark.dist
def test_a_killed_holder_blocks_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    folder, begun, key = tmp_path / "cache", tmp_path / "begun", "ab" * 32
    with processes(hold, [(folder, key, begun)]) as (child,):
        wait_for(begun, child)
        cache, got = ShardCache(folder, 1 << 20), []
        waiting = threading.Thread(target=lambda: got.append(cache.open(key, 5, fill_with(b"whole"))))
        waiting.start()
        until(lambda: blocked(folder / f"{key}.lock"))
        assert len([name for name in kept(folder) if name.endswith(".part")]) == 1  # whose writer lives
        assert child.pid
        os.kill(child.pid, signal.SIGKILL)
        waiting.join(LIMIT_S)
    assert [buffer[:] for buffer in got] == [b"whole"]
    assert kept(folder) == [f"{key}.shard"]


@pytest.mark.fault
def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one process would hold the removed file's lock, and the next one that of a new file."""
    cache, key = ShardCache(tmp_path, 1000), "a" * 64
    lock, path, left = fcntl.flock, tmp_path / f"{key}.lock", [True]

    def flock(file: Any, how: int) -> None:
        if left and path.exists():
            left.pop()
            path.unlink()  # its last holder leaves, after it was opened here
        lock(file, how)

    def fill(draft: Draft) -> bool:
        assert path.exists()
        return False

    monkeypatch.setattr(fcntl, "flock", flock)
    cache.open(key, 10, fill)
    assert not left


def wait_for(path: Path, child: BaseProcess) -> None:
    until(lambda: path.exists() or not child.is_alive())
    assert path.exists(), "it died"


def blocked(lock: Path) -> bool:
    """Whether somebody waits for a lock: the kernel's table has him behind an arrow."""
    inode = lock.stat().st_ino
    lines = Path("/proc/locks").read_text().splitlines()
    return any("-> " in line and f":{inode} " in line for line in lines)


# --- the limit


def test_what_was_used_least_recently_leaves(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3000)
    keys = [f"{number:064x}" for number in range(5)]
    for key in keys[:3]:
        cache.open(key, 1000, fill_with(bytes(1000)))
    assert cache.get(keys[0]) is not None  # used again: now 1 is the oldest
    cache.open(keys[3], 1000, fill_with(bytes(1000)))
    assert kept(tmp_path) == sorted(f"{keys[number]}.shard" for number in (0, 2, 3))
    cache.open(keys[4], 2000, fill_with(bytes(2000)))
    assert kept(tmp_path) == sorted(f"{keys[number]}.shard" for number in (3, 4))


def test_a_mapped_shard_survives_its_removal(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, len(DATA) + 10)
    buffer = cache.open("a" * 64, len(DATA), fill_with(DATA))
    assert buffer is not None
    cache.open("b" * 64, 100, fill_with(bytes(100)))
    assert kept(tmp_path) == [f"{'b' * 64}.shard"]
    assert buffer[:] == DATA


def test_a_shard_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    store = Store(QUICK, ShardCache(tmp_path, 1000))
    with pytest.raises(UserError, match=r"1000 bytes are less than one shard of 300000 bytes; give the cache"):
        store.open(in_memory("large.tar", DATA))


def test_where_others_take_all_room_shards_are_read_all_the_same(tmp_path: Path) -> None:
    cache, inner = ShardCache(tmp_path, len(DATA) + 10), []
    store = Store(QUICK, cache)

    def fill(draft: Draft) -> bool:
        inner.append(store.open(in_memory("a.tar", DATA), sha256=sha256(DATA))[:])
        return False

    cache.open("c" * 64, 1000, fill)
    assert inner == [DATA]
    assert (store.cache_misses, kept(tmp_path)) == (1, [])


def test_what_is_being_written_counts(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2500)
    cache.open("a" * 64, 1000, fill_with(bytes(1000)))

    def fill(draft: Draft) -> bool:
        cache.open("c" * 64, 1000, fill_with(bytes(1000)))
        return True

    cache.open("b" * 64, 1000, fill)
    assert kept(tmp_path) == [f"{'b' * 64}.shard", f"{'c' * 64}.shard"]


# --- faults of the folder


@pytest.mark.parametrize("below", ["a file", "/proc"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=r"cannot be used as a cache \(.*\); name a folder that can be written"):
        ShardCache(tmp_path / below / "cache", 1000)


def test_a_folder_that_is_not_local_is_refused() -> None:
    with pytest.raises(UserError, match="s3://bucket/cache: is no local path"):
        ShardCache("s3://bucket/cache", 1000)


@pytest.mark.fault
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    store = Store(QUICK, ShardCache(tmp_path, 1 << 20))
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"cannot be used as a cache \(No space left on device\); free some space"):
        store.open(in_memory("a.tar", DATA))
    assert kept(tmp_path) == []


@pytest.mark.fault
def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fill(draft: Draft) -> bool:
        draft.write(0, b"half")
        raise UserError("cannot be reached")

    cache = ShardCache(tmp_path, 1000)
    with pytest.raises(UserError, match="cannot be reached"):
        cache.open("a" * 64, 100, fill)
    assert kept(tmp_path) == []
    assert cache.open("a" * 64, 5, fill_with(b"whole")) is not None


def test_unfinished_files_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead, living = tmp_path / "elsewhere-1-0123.part", tmp_path / "elsewhere-2-4567.part"
    dead.write_bytes(bytes(900))
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache = ShardCache(tmp_path, 1000)
        assert kept(tmp_path) == [living.name]
        assert cache.open("a" * 64, 1000, fill_with(bytes(1000))) is not None


def test_keys_without_a_hash_depend_on_all_that_is_known() -> None:
    keys = {
        url_key(*known)
        for known in (
            ("s3://a/0.tar", 1, "e"),
            ("s3://b/0.tar", 1, "e"),
            ("s3://a/0.tar", 2, "e"),
            ("s3://a/0.tar", 1, "f"),
        )
    }
    assert len(keys) == 4


def test_what_is_no_hash_never_becomes_a_path(tmp_path: Path) -> None:
    store = Store(QUICK, ShardCache(tmp_path / "cache", 1 << 20))
    assert store.open(in_memory("a.tar", DATA), sha256="../../escaped")[:] == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert storage.list_names(tmp_path / "cache") == []
