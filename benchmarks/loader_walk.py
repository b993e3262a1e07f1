"""Walking over tars without decoding: the key of each sample and the content of its members, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks import loader_peers
from benchmarks.harness import Bench
from benchmarks.loader_data import Shards
from benchmarks.timing import Contender
from vqscale import storage
from vqscale.data import tar

Content = bytes | memoryview
_PASSES = {"ours": 8, "ours_copied": 4, "webdataset": 1}  # a lap of each, so that none is over in an instant


def measure(bench: Bench, shards: Shards) -> None:
    """Check and race the walks; the tars are in the page cache.

    Ours hands contents out as views into the mapped tar, as it does to the decoder; `ours_copied` copies them, as
    webdataset does.
    """
    walks: dict[str, Callable[[], Iterator[tuple[str, dict[str, Content]]]]] = {
        "ours": lambda: walk(shards),
        "ours_copied": lambda: copied(shards),
        "webdataset": lambda: peer(shards),
    }
    theirs = dict(walks["webdataset"]())
    for who in ("ours", "ours_copied"):
        found = dict(walks[who]())
        wrong = sum(found.get(key) != theirs.get(key) for key in {*found, *theirs}) + abs(len(found) - shards.samples)
        bench.check(f"walk_{who}", "samples whose key or content is not webdataset's", wrong, 0)
    race = bench.race("walk", [_contender(who, make) for who, make in walks.items()])
    for who in walks:
        bench.figure(f"walk_{who}", race.rates(who), "samples/s")
    bench.ratio("walk_vs_webdataset", race.rates("ours"), race.rates("webdataset"))


def _contender(who: str, make: Callable[[], Iterator[object]]) -> Contender:
    return Contender(who, lambda: sum(sum(1 for _ in make()) for _ in range(_PASSES[who])))


def walk(shards: Shards) -> Iterator[tuple[str, dict[str, Content]]]:
    """Key, and by extension a view of the content, of each sample."""
    for path in shards.paths:
        buffer = storage.open_shard(path)
        view = memoryview(buffer)
        for key, fields in tar.samples(buffer, str(path)):
            yield key, {name: view[offset : offset + size] for name, (offset, size) in fields.items()}


def copied(shards: Shards) -> Iterator[tuple[str, dict[str, Content]]]:
    """The same with contents in memory of their own."""
    for key, parts in walk(shards):
        yield key, {name: bytes(one) for name, one in parts.items()}


def peer(shards: Shards) -> Iterator[tuple[str, dict[str, Content]]]:
    """The same from webdataset, which reads the contents."""
    for sample in loader_peers.walk_webdataset(shards):
        yield sample["__key__"], {"cls": sample["cls"], "jpg": sample["jpg"]}
