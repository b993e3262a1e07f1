"""Size and shuffled reading of code shards, on one core, against the layouts of `codes_peers`.

The codes are those of the extracted images, in blocks of all of them, each block shifted by another offset: so no two
samples are equal, and within a block zstd meets no image twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import codes_peers
from benchmarks.harness import Bench
from benchmarks.loader_peers import find_litdata
from benchmarks.timing import Contender
from vqscale.data.code_records import CodeRecord, manifest_from_records
from vqscale.data.code_source import CodeGroup, CodeSource
from vqscale.data.codes import CodeBlock, empty_fields, write_code_shard
from vqscale.data.manifest import CodeLevel, write_manifest
from vqscale.data.order import Group, StreamOrder
from vqscale.data.shards import open_shards
from vqscale.data.source import Fields

SHARDS, STREAMS, PACKET, BATCH = 32, 4, 16, 256
PER_SHARD, QUICK = 512, 6
"""Samples of a shard; with few, a lap is over before what a pass begins with has been paid off."""

_UNIT = "samples/s"
_KEPT = 2 * STREAMS  # open groups; an order needs one a stream, and two where groups meet


def measure(bench: Bench, levels: Sequence[CodeLevel], codes: Mapping[str, NDArray[np.uint16]]) -> None:
    """Write, check and race both layouts."""
    per_shard = QUICK if bench.quick else PER_SHARD
    samples = SHARDS * per_shard
    grids = multiplied(codes, samples)
    block = len(next(iter(codes.values())))
    bench.config["reading"] = {"samples": samples, "shards": SHARDS, "block": block, "packet": PACKET}
    bench.report("reading, writing", 0, 1)
    source = write_shards(bench.folder / "read", levels, grids, block)
    counts = source.manifest.counts
    order = StreamOrder(counts, seed=0, streams=STREAMS, packet=PACKET, shuffle=2 * per_shard)
    readers: dict[str, Callable[[], Iterator[Fields]]] = {"ours": lambda: shuffled(source, order, samples)}
    readers |= peers(bench, levels, grids)
    bench.report("reading, writing", 1, 1)
    for name, read in readers.items():
        check(bench, name, read(), grids)
    race = bench.race("reading", [_contender(name, read) for name, read in readers.items()])
    bench.figure("read_samples_per_s_core", race.cpu_rates("ours"), _UNIT)
    for name in readers.keys() - {"ours"}:
        bench.figure(f"{name}_samples_per_s_core", race.cpu_rates(name), _UNIT)
        bench.ratio(f"read_vs_{name}", race.cpu_rates("ours"), race.cpu_rates(name))
    plain = sum(array.nbytes for array in grids.values())
    bench.figure("bits_a_code", [16 * source.manifest.bytes / plain], "bits")
    bench.ratio("bytes_vs_uint16", [source.manifest.bytes], [plain])


def peers(
    bench: Bench, levels: Sequence[CodeLevel], grids: Mapping[str, NDArray[np.uint16]]
) -> dict[str, Callable[[], Iterator[Fields]]]:
    """The same samples in the layouts of others, as readers of a shuffled pass."""
    samples = len(next(iter(grids.values())))
    files = codes_peers.write_files(bench.folder / "npy", grids)
    picks = np.random.default_rng(0).permutation(samples)
    found = {"npy": lambda: codes_peers.from_files(files, levels, picks, BATCH)}
    litdata = find_litdata()
    if isinstance(litdata, str):
        bench.skip("litdata", litdata)
        return found
    chunks = codes_peers.write_litdata(litdata, bench.folder / "litdata", grids, samples // SHARDS)
    found["litdata"] = lambda: codes_peers.from_litdata(litdata, chunks, levels, BATCH)
    return found


def multiplied(codes: Mapping[str, NDArray[np.uint16]], samples: int) -> dict[str, NDArray[np.uint16]]:
    """So many samples: all images again and again, each time shifted."""
    found = {}
    for name, grids in codes.items():
        times = -(-samples // len(grids))
        shifted = [np.roll(grids, (time // grids.shape[1], time), axis=(1, 2)) for time in range(times)]
        found[name] = np.concatenate(shifted)[:samples]
    return found


def write_shards(
    folder: Path, levels: Sequence[CodeLevel], grids: Mapping[str, NDArray[np.uint16]], block: int
) -> CodeSource:
    """The samples as code shards of about equal size; sample i has the label i."""
    samples = len(next(iter(grids.values())))
    records: list[CodeRecord] = []
    for rows in np.array_split(np.arange(samples), SHARDS):
        parts = [rows[start : start + block] for start in range(0, len(rows), block)]
        blocks = [
            CodeBlock({name: array[part] for name, array in grids.items()}, part, [f"{row:08d}" for row in part])
            for part in parts
        ]
        shard = write_code_shard(folder / f"shard-{len(records):05d}.tar", blocks, levels, "bench")
        records.append(CodeRecord(shard=shard, fingerprint="bench"))
    manifest = manifest_from_records(
        records, levels=levels, classes=(), image_size=None, fingerprint="bench", source={}
    )
    write_manifest(folder, manifest)
    return CodeSource(open_shards(str(folder)))


def shuffled(source: CodeSource, order: StreamOrder, samples: int) -> Iterator[Fields]:
    """Batches in the canonical order, as the loader reads them, but in this thread; some last samples are left out."""
    packets = islice(order.packets(0, 1), (samples - STREAMS * PACKET) // PACKET)
    opened: dict[Group, CodeGroup] = {}
    out, row = empty_fields(source.manifest.levels, BATCH), 0
    for packet in packets:
        for part in packet.parts:
            if part.group not in opened:
                opened[part.group] = source.open_group(part.group.shards)
                if len(opened) > _KEPT:
                    del opened[next(iter(opened))]
            opened[part.group].read(part.group.picks[part.start : part.stop], out, row)
            row += part.stop - part.start
        if row == BATCH:
            yield out
            row = 0
    if row:
        yield {name: array[:row] for name, array in out.items()}


def check(bench: Bench, name: str, batches: Iterator[Fields], grids: Mapping[str, NDArray[np.uint16]]) -> None:
    """Whether a pass has other codes than were written, a sample twice, or too few samples."""
    wrong, seen = 0, np.zeros(len(next(iter(grids.values()))), np.int64)
    for batch in batches:
        labels = batch["label"]
        np.add.at(seen, labels, 1)
        wrong += sum(int((batch[level] != array[labels]).sum()) for level, array in grids.items())
    bench.check(f"{name}_codes", "codes that differ from those that were written", wrong, 0)
    bench.check(f"{name}_twice", "samples that are there twice in a pass", int((seen > 1).sum()), 0)
    left_out = STREAMS * PACKET + PACKET
    bench.check(f"{name}_missing", "samples that are not there in a pass", int((seen == 0).sum()), left_out)


def _contender(name: str, read: Callable[[], Iterator[Fields]]) -> Contender:
    return Contender(name, lambda: sum(len(batch["label"]) for batch in read()))
