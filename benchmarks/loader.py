"""Benchmark `loader`: image shards to uint8 batches on two threads, against peers on two worker processes.

Two data sets: photographs at their own sizes (`raw`), which every loader crops and resizes, and the same ones stored at
the wanted size (`presized`). Each loader is started anew for every lap and timed in the middle of its work: the start
of worker processes and the first batches are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import loader_data, loader_floors, loader_peers, loader_walk
from benchmarks.harness import Bench
from benchmarks.loader_data import Shards, facts
from benchmarks.loader_peers import Delivery, Feed
from benchmarks.pagecache import drop
from benchmarks.result import at_least
from benchmarks.timing import Contender, Race
from vqscale.data import images
from vqscale.data.image_source import ImageSource
from vqscale.data.loader import Loader
from vqscale.data.order import StreamOrder
from vqscale.data.shards import open_shards

GOALS = {
    "raw_vs_webdataset_pil": at_least(2.7),
    "raw_fraction_of_floor": at_least(0.90),
    "presized_vs_webdataset_simplejpeg": at_least(2.0),
    "presized_fraction_of_floor": at_least(0.90),
    "walk_vs_webdataset": at_least(10),
}
PACKAGES = ("webdataset", "litdata", "pillow", "simplejpeg")

SIZE, QUALITY, THREADS = 256, 90, 2
PACKET, SHUFFLE = 16, 4_096  # the recipe's defaults

_WALL, _CPU = "images/s", "images/CPU s"
_COLD_PAGES = 0.01  # of a file's pages that may be left in the page cache of a cold lap


@dataclass(frozen=True)
class Sizes:
    """How much is read."""

    shards: int
    per_shard: int
    batch: int
    run_in: int
    """Images that are read before the clock runs; more than any loader keeps ready."""
    window: int
    """Images that are timed."""


RAW, QUICK = Sizes(12, 160, 32, 256, 1_024), Sizes(4, 32, 16, 64, 32)
PRESIZED = Sizes(12, 352, 32, 512, 3_072)


@dataclass(frozen=True)
class Opened:
    """A loader that can be started, and the files that it reads."""

    start: Callable[[], Feed]
    paths: Sequence[Path]


def run(bench: Bench) -> None:
    """Measure both data sets and the walk over tars."""
    photographs = loader_data.photographs(bench.options.data, generated=12 if bench.quick else 200)
    small = loader_data.presized(photographs.files, bench.folder / "packing", SIZE, QUALITY)
    bench.config |= {
        "size": SIZE,
        "threads": THREADS,
        "workers": THREADS,
        "cold": "files dropped from this machine's page cache; caches below it are not touched",
    }
    bench.config["raw"] = photographs.facts()
    bench.config["presized"] = {"origin": f"raw, stored by `vqscale data pack` at quality {QUALITY}", **facts(small)}
    with one_torch_thread():
        measure(bench, "raw", photographs.files, QUICK if bench.quick else RAW)
        shards = measure(bench, "presized", small, QUICK if bench.quick else PRESIZED)
    loader_walk.measure(bench, shards)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Each decoding thread resizes its own images; torch would share one image among all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(bench: Bench, name: str, files: Sequence[bytes], sizes: Sizes) -> Shards:
    """Write, check and race one data set; returns its tars."""
    bench.config[name] |= vars(sizes)
    bench.report(f"{name}, writing", 0, 1)
    shards = loader_data.write_shards(files, bench.folder / name, sizes.shards, sizes.per_shard)
    loaders = open_loaders(bench, name, shards, sizes)
    bench.report(f"{name}, writing", 1, 1)
    check(bench, name, loaders, shards)
    warm(bench, name, loaders, shards, sizes)
    kept = drop(shards.paths)
    if kept <= _COLD_PAGES:
        cold(bench, name, loaders, sizes)
    else:
        bench.skip(f"{name}_cold", f"the temporary folder's file system keeps {kept:.0%} of the tars in the page cache")
    return shards


def open_loaders(bench: Bench, name: str, shards: Shards, sizes: Sizes) -> dict[str, Opened]:
    """Ours and its peers, by name."""
    how = Delivery(SIZE, sizes.batch, THREADS)
    files = loader_data.write_files(shards, bench.folder / f"{name}-files")
    loaders = {
        "ours": Opened(partial(ours, shards, how), shards.paths),
        "webdataset_pil": Opened(partial(loader_peers.webdataset_pil, shards, how), shards.paths),
        "webdataset_simplejpeg": Opened(partial(loader_peers.webdataset_simplejpeg, shards, how), shards.paths),
        "image_folder": Opened(partial(loader_peers.image_folder, files, how), files),
    }
    litdata = loader_peers.find_litdata()
    if isinstance(litdata, str):
        bench.skip("litdata", litdata)
    else:
        chunks = loader_peers.write_litdata(litdata, shards, bench.folder / f"{name}-litdata")
        start = partial(loader_peers.litdata_pil, litdata, chunks, how)
        loaders["litdata"] = Opened(start, sorted(chunks.glob("*.bin")))
    return loaders


def ours(shards: Shards, how: Delivery) -> Feed:
    """`vqscale.data.loader.Loader` as training uses it."""
    source = ImageSource(open_shards(shards.url), how.size)
    counts = source.manifest.counts
    order = StreamOrder(counts, seed=0, streams=len(counts), packet=PACKET, shuffle=SHUFFLE)
    loader = Loader(source, order, rank=0, world=1, global_batch=how.batch, threads=how.workers)
    return Feed(((batch.fields["image"], batch.fields["label"]) for batch in loader), loader.close)


def check(bench: Bench, name: str, loaders: Mapping[str, Opened], shards: Shards) -> None:
    """Whether one pass of each loader has every sample once, with the pixels that `images.decode` gives."""
    reference = np.stack([images.decode(file, SIZE) for file in shards.files])
    for done, (who, loader) in enumerate(loaders.items()):
        bench.report(f"{name}, checks", done, len(loaders))
        labels, difference = one_pass(loader, shards.samples, reference, BLOCK[name])
        wrong = np.abs(np.bincount(labels, minlength=shards.samples) - 1).sum()
        bench.check(f"{name}_{who}_samples", "samples that are missing or there twice in a pass", int(wrong), 0)
        what = (
            f"largest mean difference of an image to ours in grey levels, blocks of {BLOCK[name]}×{BLOCK[name]} pixels"
        )
        bench.check(f"{name}_{who}_pixels", what, difference, 0 if who == "ours" else TOLERANCE[name])
    bench.report(f"{name}, checks", len(loaders), len(loaders))


BLOCK, TOLERANCE = {"raw": 8, "presized": 1}, {"raw": 4.0, "presized": 0.5}
"""Side of the blocks whose means are compared, and grey levels that an image may differ by.

Resized pixels differ by filter (ours is bicubic, the peers are bilinear, as is the habit of each) and by up to a pixel
in where the centre lies, but hardly in the means of blocks. Those of another image differ by 50 grey levels and more,
those of swapped channels by 15."""


def one_pass(loader: Opened, samples: int, reference: NDArray[np.uint8], block: int) -> tuple[NDArray[np.int64], float]:
    """The labels of a pass, and the largest mean difference of an image from the reference."""
    labels: list[NDArray[np.int64]] = []
    feed, largest = loader.start(), 0.0
    try:
        while sum(len(numbers) for numbers in labels) < samples:
            pixels, numbers = (np.asarray(part) for part in feed.batch())
            expected = reference[numbers % len(reference)]
            difference = block_means(pixels, block) - block_means(expected, block)
            largest = max(largest, float(np.abs(difference).mean(axis=(1, 2, 3)).max()))
            labels.append(numbers)
    finally:
        feed.close()
    return np.concatenate(labels), largest


def block_means(pixels: NDArray[np.uint8], block: int) -> NDArray[np.float32]:
    """Means of squares of pixels: [n, S, S, 3] to [n, S / block, S / block, 3]."""
    count, side, _, channels = pixels.shape
    parts = pixels.astype(np.float32).reshape(count, side // block, block, side // block, block, channels)
    return parts.mean(axis=(2, 4))


def contender(who: str, loader: Opened, run_in: int, window: int, dropped: bool = False) -> Contender:
    """A loader that is started before each lap; its first images, which wait for the start, are not timed."""
    running: list[Feed] = []

    def before() -> None:
        if dropped and (kept := drop(loader.paths)) > _COLD_PAGES:
            raise RuntimeError(f"{who}: {kept:.0%} of its files stay in the page cache; are they still mapped?")
        running.append(loader.start())
        running[0].read(run_in)

    return Contender(who, lambda: running[0].read(window), before, lambda: running.pop().close())


def warm(bench: Bench, name: str, loaders: Mapping[str, Opened], shards: Shards, sizes: Sizes) -> None:
    """Race loaders and floors, files in the page cache."""
    contenders = [contender(who, loader, sizes.run_in, sizes.window) for who, loader in loaders.items()]
    race = bench.race(f"{name}, warm", [*contenders, *floors(name, shards, sizes)])
    keep(bench, name, race, loaders)
    for key, formula in FLOORS[name].items():
        bench.floor(f"{name}_{key}", race.rates(key), _WALL, formula)
        bench.floor(f"{name}_{key}_cpu", race.cpu_rates(key), _CPU, formula)
    own = race.rates("ours")
    if name == "raw":
        bench.ratio("raw_vs_webdataset_pil", race.cpu_rates("ours"), race.cpu_rates("webdataset_pil"))
        bench.ratio("raw_fraction_of_floor", own, race.rates("decode_resize"))
    else:
        bench.ratio("presized_vs_webdataset_simplejpeg", own, race.rates("webdataset_simplejpeg"))
        bench.ratio("presized_fraction_of_floor", own, race.rates("decode"))


def cold(bench: Bench, name: str, loaders: Mapping[str, Opened], sizes: Sizes) -> None:
    """Race loaders, each lap with files that are not in the page cache; no lap reads a sample twice."""
    race = bench.race(
        f"{name}, cold",
        [contender(who, loader, sizes.run_in, sizes.window, dropped=True) for who, loader in loaders.items()],
    )
    keep(bench, name, race, loaders, "_cold")


def keep(bench: Bench, name: str, race: Race, loaders: Mapping[str, Opened], mark: str = "") -> None:
    """Keep every loader's images a second and a CPU second."""
    for who in loaders:
        bench.figure(f"{name}_{who}{mark}", race.rates(who), _WALL)
        bench.figure(f"{name}_{who}{mark}_cpu", race.cpu_rates(who), _CPU)


FLOORS = {
    "raw": {
        "decode": f"simplejpeg.decode_jpeg on {THREADS} threads over files in memory",
        "decode_resize": f"images.decode_into, as ours, on {THREADS} threads over files in memory into one buffer",
    },
    "presized": {
        "decode": f"simplejpeg.decode_jpeg on {THREADS} threads over files in memory into one preallocated buffer",
    },
}


def floors(name: str, shards: Shards, sizes: Sizes) -> list[Contender]:
    """The loops over files in memory that belong to a data set."""
    loops = {"decode": loader_floors.decode_only, "decode_resize": loader_floors.decode_resize}
    if name == "presized":
        loops = {"decode": loader_floors.decode_in_place}
    contents = shards.contents()
    return [
        loader_floors.loop(key, contents, decode, threads=THREADS, size=SIZE, batch=sizes.batch, count=sizes.window)
        for key, decode in loops.items()
    ]
