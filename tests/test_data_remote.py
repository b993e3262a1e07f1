"""Remote files arrive whole whatever the network does, or end in one clear line."""

from __future__ import annotations

import importlib
import random
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest

from tests.fault_proxy import FaultProxy, Faults
from vqscale import storage
from vqscale.errors import UserError
from vqscale.storage import remote
from vqscale.storage.access import Access, retried

if TYPE_CHECKING:  # the plugin is imported by pytest
    from tests.object_store import ObjectStore

pytest_plugins = ("tests.object_store",)

DATA = random.Random(0).randbytes((9 << 20) + 12_345)
QUICK = Access(backoff_s=0.005, longest_backoff_s=0.02)


def read(url: str, access: Access = QUICK) -> tuple[bytes, Counter[str]]:
    retries: Counter[str] = Counter()
    content = remote.read_remote(url, access, on_retry=lambda kind: retries.update([kind]))
    return content[:], retries


# --- what networks do


@pytest.mark.fault
@pytest.mark.parametrize(
    ("network", "done", "counted"),
    [
        (Faults(unavailable=0.3), "unavailable", "status"),
        (Faults(reset=0.05), "reset", "reset"),
        (Faults(cut=0.05), "cut", "reset"),
        (Faults(unavailable=0.2, reset=0.05), "reset", "status"),
    ],
    ids=["503", "reset", "cut", "both"],
)
def test_every_byte_arrives(object_store: ObjectStore, network: Faults, done: str, counted: str) -> None:
    url = object_store.put("shard.tar", DATA)
    with FaultProxy(object_store.port, network, seed=1) as proxy:
        object_store.use(proxy.port)
        content, retries = read(url, replace(QUICK, block=1 << 18))
    assert content == DATA
    assert proxy.counts[done] > 0
    assert retries[counted] > 0


@pytest.mark.fault
def test_a_link_that_never_carries_a_whole_block_delivers(object_store: ObjectStore) -> None:
    """128 chunks arrive together once in 700 times: the ranges have to shrink."""
    url = object_store.put("shard.tar", DATA)
    with FaultProxy(object_store.port, Faults(reset=0.05), seed=2) as proxy:
        object_store.use(proxy.port)
        content, retries = read(url)
    assert content == DATA
    assert retries["reset"] > 1
    assert proxy.counts["bytes"] < 5 * len(DATA)  # not from the beginning each time


@pytest.mark.fault
def test_ten_minutes_of_silence_are_cut_short(object_store: ObjectStore) -> None:
    url = object_store.put("shard.tar", DATA)
    with FaultProxy(object_store.port, Faults(stalls={1: 600.0}), seed=3) as proxy:
        object_store.use(proxy.port)
        content, retries = read(url, Access(timeout_s=2.5, backoff_s=0.01))
    assert content == DATA
    assert proxy.counts["stall"] == 1
    assert retries["timeout"] >= 1


@pytest.mark.fault
def test_a_slow_link_gets_smaller_ranges(object_store: ObjectStore) -> None:
    """A block would take longer than its time limit."""
    url = object_store.put("shard.tar", DATA[: 1 << 19])
    with FaultProxy(object_store.port, Faults(bytes_per_s=160_000), seed=4) as proxy:
        object_store.use(proxy.port)
        content, retries = read(url, Access(timeout_s=2.5, block=1 << 19, backoff_s=0.01))
    assert content == DATA[: 1 << 19]
    assert retries["timeout"] > 0


@pytest.mark.fault
def test_tries_are_bounded_and_end_in_one_line(object_store: ObjectStore) -> None:
    url = object_store.put("shard.tar", DATA[:100])
    with FaultProxy(object_store.port, Faults(unavailable=1.0)) as proxy:
        object_store.use(proxy.port)
        with pytest.raises(
            UserError, match=f"^{url}: cannot be reached, 4 tries in a row failed .*; check the network"
        ):
            read(url, Access(retries=3, backoff_s=0.005))
    assert proxy.counts["unavailable"] == 4  # the libraries try nothing of themselves


@pytest.mark.fault
def test_a_server_that_is_not_there_ends_in_one_line(object_store: ObjectStore) -> None:
    with FaultProxy(object_store.port) as proxy:
        gone = proxy.port
    object_store.use(gone)
    with pytest.raises(UserError, match="cannot be reached, 3 tries in a row failed"):
        read(object_store.url("shard.tar"), Access(retries=2, backoff_s=0.005))


@pytest.mark.fault
def test_writes_and_listings_are_tried_again(object_store: ObjectStore) -> None:
    folder = object_store.url("folder")
    url = storage.join(folder, "manifest.json")
    with FaultProxy(object_store.port, Faults(unavailable=0.4), seed=5) as proxy:
        object_store.use(proxy.port)
        for content in (b"1", b"12", b"123"):
            remote.write_remote(url, content, QUICK)
            assert read(url)[0] == content
            assert remote.entries(folder, QUICK) == ["manifest.json"]
        remote.remove_remote(url, QUICK)
        remote.remove_remote(url, QUICK)
        assert remote.find(url, QUICK) is None
        assert remote.entries(folder, QUICK) is None
    assert proxy.counts["unavailable"] > 3


def test_rests_grow_and_are_limited() -> None:
    rests: list[float] = []

    def call() -> int:
        if len(rests) < 6:
            raise ConnectionResetError
        return 1

    access = Access(retries=6, backoff_s=1.0, longest_backoff_s=5.0)
    assert retried(call, "s3://x/y", access, None, rests.append) == 1
    for rest, longest in zip(rests, [1, 2, 4, 5, 5, 5], strict=True):
        assert longest / 2 <= rest <= longest


# --- what does not heal


def test_what_is_not_there_fails_at_once(object_store: ObjectStore) -> None:
    with FaultProxy(object_store.port) as proxy:
        object_store.use(proxy.port)
        with pytest.raises(UserError, match=r"shard\.tar: no such file"):
            read(object_store.url("shard.tar"))
        with pytest.raises(UserError, match="no such file"):
            read("s3://nobucket/shard.tar")
    assert proxy.counts["request"] <= 6  # a head and a listing, once


def test_a_folder_is_no_file(object_store: ObjectStore) -> None:
    object_store.put("folder/file", b"x")
    with pytest.raises(UserError, match="is a folder"):
        read(object_store.url("folder"))
    assert storage.size(object_store.url("folder")) is None
    assert storage.list_names(object_store.url("folder/file")) is None
    assert storage.list_names(object_store.url("nothing")) is None


def test_a_missing_bucket_is_not_made(object_store: ObjectStore) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="no such file"):
            storage.write_bytes("s3://mistyped/file", b"x")


def test_the_empty_object_of_a_folder_is_not_listed(object_store: ObjectStore) -> None:
    object_store.put("folder/", b"")
    object_store.put("folder/a", b"x")
    assert storage.list_names(object_store.url("folder")) == ["a"]


def test_listings_and_sizes_are_fresh(object_store: ObjectStore) -> None:
    object_store.put("folder/a", b"x")
    assert storage.list_names(object_store.url("folder")) == ["a"]
    url = object_store.put("folder/b", b"x")
    assert storage.list_names(object_store.url("folder")) == ["a", "b"]
    assert storage.size(url) == 1
    object_store.put("folder/b", b"xyz")
    assert storage.size(url) == 3


@pytest.mark.parametrize("later", [DATA[::-1], DATA[:100], None], ids=["replaced", "shortened", "removed"])
def test_a_file_that_changes_while_it_is_read_is_refused(object_store: ObjectStore, later: bytes | None) -> None:
    url = object_store.put("shard.tar", DATA)
    changed = threading.Event()

    def write(offset: int, data: bytes) -> None:
        if changed.is_set():
            return
        changed.set()
        if later is None:
            fsspec.filesystem("s3").rm_file(url)
        else:
            object_store.put("shard.tar", later)

    access = Access(block=1 << 20, connections=1, backoff_s=0.005)
    with pytest.raises(UserError, match=r"shard\.tar: was changed while it was read"):
        remote.copy_remote(url, remote.look(url), write, access)


def test_another_size_than_the_manifest_says_is_refused(object_store: ObjectStore) -> None:
    url = object_store.put("shard.tar", b"12345")
    with pytest.raises(UserError, match="has 5 bytes, its manifest says 7"):
        remote.read_remote(url, QUICK, size=7)


@pytest.mark.parametrize("size", [0, 1, remote.LEAST, remote.LEAST + 1, 3 << 20], ids=str)
def test_sizes_at_the_edges_of_ranges(object_store: ObjectStore, size: int) -> None:
    url = object_store.put("shard.tar", DATA[:size])
    assert read(url, Access(block=1 << 20))[0] == DATA[:size]


def test_without_credentials(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = object_store.put("shard.tar", b"x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"permission denied .*; give credentials by the environment"):
        read(url)


# --- other file systems


def test_memory() -> None:
    fsspec.filesystem("memory").pipe_file("/remote/shard.tar", DATA)
    assert read("memory://remote/shard.tar", Access(block=1 << 20))[0] == DATA


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.import_module("fsspec.registry").known_implementations
    monkeypatch.setitem(known, "odd", {"class": "oddfs_package.Odd", "err": "Install oddfs"})
    with pytest.raises(UserError, match=r"package oddfs_package; pip install -c constraints\.txt oddfs_package"):
        read("odd://bucket/file")
    with pytest.raises(UserError, match="cannot be reached"):
        read("nosuchscheme://bucket/file")
