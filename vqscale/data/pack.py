"""From image files to WebDataset shards with a manifest: mixed by a seed, in parallel, always the same bytes.

The work is split by shard: `plan_pack` says what goes where, `write_shard` writes one shard, `finish` the
manifest. `pack_images` does it all with processes of this machine; a stage does it with its ranks.
"""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vqscale import storage
from vqscale.data import images, tar
from vqscale.data.bad import BadSample
from vqscale.data.manifest import IMAGES, MANIFEST, Manifest, Shard, hash_bytes, read_manifest, write_manifest
from vqscale.data.order import generator
from vqscale.data.scan import Entry, Scan, scan, unpacked
from vqscale.errors import UserError

Format = Literal["jpeg", "png"]
SKIPPED = "skipped.txt"
"""Lists the files that were left out, one `reason<TAB>name` a line."""

_SHUFFLE = 10  # keeps the generator apart from those of order.py
_SHARD_BYTES = 64 << 20
_PIXEL_BYTES = {"jpeg": 0.6, "png": 2.0}


@dataclass(frozen=True)
class PackPlan:
    """Which image goes into which shard, and how it is stored."""

    source: Scan
    origin: str
    """Name of what is packed, for the manifest."""
    dest: str
    order: NDArray[np.int64]
    """int64 [images]: entries of the source in the order in which they are stored."""
    shards: int
    size: int
    format: Format
    quality: int
    seed: int

    def entries(self, number: int) -> Iterator[tuple[int, Entry]]:
        """Position in the order, and entry, of each image of a shard; shards differ by one image at most."""
        total = len(self.order)
        for position in range(number * total // self.shards, (number + 1) * total // self.shards):
            yield position, self.source.entries[self.order[position]]


@dataclass(frozen=True)
class PackedShard:
    """What became of one shard."""

    shard: Shard
    kept: int
    """Images whose bytes were stored unchanged."""
    skipped: tuple[tuple[str, str], ...]
    """(name, why) of the files that could not be read."""


def plan_pack(
    source: Scan,
    dest: str,
    *,
    size: int,
    format: Format = "jpeg",
    quality: int = 95,
    shards: int | None = None,
    shard_samples: int | None = None,
    seed: int = 0,
    origin: str = "",
    chosen: NDArray[np.int64] | None = None,
) -> PackPlan:
    """Plan the shards of one folder.

    Args:
        source: the images (`scan`).
        dest: folder or URL of the shards.
        size: side of the stored images; they are cut to their centre square and resized.
        format: how images are stored that do not have this size already.
        quality: of JPEGs, 1 to 100, stored without subsampling of colour.
        shards: number of shards; by default about 64 MB each, and 24 or more where there are enough images.
        shard_samples: images of a shard, instead of `shards`.
        seed: of the shuffle over all shards.
        origin: name of the source for the manifest.
        chosen: int64, entries to pack; all by default.

    Raises:
        UserError: settings out of range, or fewer images than shards.
    """
    where = np.arange(len(source.entries)) if chosen is None else chosen
    if size < 1 or not 1 <= quality <= 100:
        raise UserError(f"size {size} or quality {quality} is out of range", mend="size >= 1, quality 1 to 100")
    count = shards or _shard_count(len(where), shard_samples, size, format)
    if count > len(where):
        raise UserError(f"{len(where)} images do not fill {count} shards", where=dest, mend="ask for fewer shards")
    order = generator(seed, _SHUFFLE).permutation(where)
    return PackPlan(source, origin or source.path.name, str(dest), order, count, size, format, quality, seed)


def plan_splits(source: Scan, dest: str, holdout: int, *, seed: int = 0, **how: object) -> list[PackPlan]:
    """Plan `dest` itself, or with `holdout` its folders `train` and `validation` (so many images by seed).

    Args:
        source: the images.
        dest: folder or URL.
        holdout: images to hold out; 0 for none.
        seed: of the choice and of the shuffles.
        how: what else `plan_pack` takes.

    Raises:
        UserError: nothing would be left to train on.
    """
    total = len(source.entries)
    if not 0 <= holdout < total:
        raise UserError(f"cannot hold out {holdout} of {total} images", where="--holdout", mend=f"use 0 to {total - 1}")
    if not holdout:
        return [plan_pack(source, dest, seed=seed, **how)]  # type: ignore[arg-type]
    mixed = generator(seed, _SHUFFLE, 1).permutation(total)
    parts = {"train": np.sort(mixed[holdout:]), "validation": np.sort(mixed[:holdout])}
    return [
        plan_pack(source, storage.join(dest, split), seed=seed, chosen=chosen, **how)  # type: ignore[arg-type]
        for split, chosen in parts.items()
    ]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def write_shard(plan: PackPlan, number: int) -> PackedShard:
    """Write one shard, whole or not at all; the same plan gives the same bytes anywhere."""
    read = plan.source.read()
    skipped: list[tuple[str, str]] = []
    kept = samples = 0

    def items() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal kept, samples
        for position, entry in plan.entries(number):
            try:
                extension, content, same = _stored(read(entry), plan)
            except BadSample as error:
                skipped.append((entry.name, error.kind))
                continue
            except OSError as error:
                skipped.append((entry.name, f"unreadable: {error.strerror}"))
                continue
            kept, samples = kept + same, samples + 1
            label = {"cls": b"%d" % entry.label} if entry.label >= 0 else {}
            yield f"{position:08d}", {extension: content, **label}

    file = io.BytesIO()
    tar.write(file, items())
    content = file.getvalue()
    storage.write_bytes(storage.join(plan.dest, shard_name(number)), content)
    shard = Shard(name=shard_name(number), samples=samples, bytes=len(content), sha256=hash_bytes(content))
    return PackedShard(shard, kept, tuple(skipped))


def finish(plan: PackPlan, packed: Sequence[PackedShard]) -> Manifest:
    """Write the list of skipped files and, last, the manifest.

    Args:
        plan: what was packed.
        packed: every shard, in order.

    Raises:
        UserError: not one image could be read.
    """
    skipped = [*plan.source.ignored, *(pair for shard in packed for pair in shard.skipped)]
    samples = sum(shard.shard.samples for shard in packed)
    if not samples:
        raise UserError("not one image can be read", where=plan.origin, mend="check the files")
    lines = "".join(f"{why}\t{name}\n" for name, why in skipped)
    if skipped:
        storage.write_bytes(storage.join(plan.dest, SKIPPED), lines.encode(errors="surrogateescape"))
    else:
        storage.remove(storage.join(plan.dest, SKIPPED))
    kept = sum(shard.kept for shard in packed)
    source: dict[str, Any] = {
        "packed_from": plan.origin,
        "format": plan.format,
        "quality": plan.quality if plan.format == "jpeg" else None,
        "seed": plan.seed,
        "kept_unchanged": kept,
        "encoded": samples - kept,
    }
    if skipped:
        source["left_out"] = [f"{why}: {name}".encode(errors="replace").decode() for name, why in skipped[:20]]
    manifest = Manifest(
        format=IMAGES,
        shards=tuple(shard.shard for shard in packed),
        classes=plan.source.classes,
        image_size=plan.size,
        skipped=len(skipped),
        source=source,
    )
    write_manifest(plan.dest, manifest)
    return manifest


def pack_images(
    src: str | Path,
    dest: str,
    *,
    size: int,
    format: Format = "jpeg",
    quality: int = 95,
    shard_samples: int | None = None,
    holdout: int = 0,
    workers: int = 1,
    seed: int = 0,
    force: bool = False,
    classes: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Manifest]:
    """Pack a folder of class folders, or a tar or tar.gz of one.

    Args:
        src: folder, tar or tar.gz.
        dest: folder or URL of the shards.
        size: side of the stored images; JPEGs that have it are stored byte for byte, so are PNGs under `png`.
        format: `jpeg` or lossless `png`.
        quality: of JPEGs.
        shard_samples: images of a shard.
        holdout: images that go to `dest/validation`; the others then go to `dest/train`.
        workers: processes.
        seed: of the shuffle and the choice of held-out images.
        force: replace shards that are there already.
        classes: as for `scan`; empty for images without a class.
        progress: called with images done and images in all.

    Returns:
        Folder or URL → its manifest.

    Raises:
        UserError: nothing to pack, `dest` is packed already, or settings out of range.
    """
    with unpacked(Path(src)) as path:
        plans = plan_splits(
            scan(path, classes),
            dest,
            holdout,
            seed=seed,
            size=size,
            format=format,
            quality=quality,
            shard_samples=shard_samples,
            origin=Path(src).name,
        )
        for plan in plans:
            _clear(plan.dest, force)
        packed = _write_all(plans, workers, progress)
        return {plan.dest: finish(plan, shards) for plan, shards in zip(plans, packed, strict=True)}


def _write_all(
    plans: list[PackPlan], workers: int, progress: Callable[[int, int], None] | None
) -> list[list[PackedShard]]:
    tasks = [(which, number) for which, plan in enumerate(plans) for number in range(plan.shards)]
    done: dict[tuple[int, int], PackedShard] = {}
    count, total = 0, sum(len(plan.order) for plan in plans)
    for task, shard in _run(plans, tasks, workers):
        done[task] = shard
        count += shard.shard.samples + len(shard.skipped)
        if progress:
            progress(count, total)
    return [[done[which, number] for number in range(plan.shards)] for which, plan in enumerate(plans)]


def _run(
    plans: list[PackPlan], tasks: list[tuple[int, int]], workers: int
) -> Iterator[tuple[tuple[int, int], PackedShard]]:
    if workers <= 1 or len(tasks) == 1:
        for which, number in tasks:
            yield (which, number), write_shard(plans[which], number)
        return
    # Spawned, not forked: a progress display has threads, which a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _receive, (plans,)) as pool:
        futures = {pool.submit(_work, *task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_received: list[PackPlan] = []  # in a worker: the plans, sent once


def _receive(plans: list[PackPlan]) -> None:
    _received[:] = plans


def _work(which: int, number: int) -> PackedShard:
    return write_shard(_received[which], number)


def _clear(dest: str, force: bool) -> None:
    """Refuse a finished destination, or take its manifest and shards away."""
    if storage.size(storage.join(dest, MANIFEST)) is None:
        return
    if not force:
        raise UserError("is packed already", where=dest, mend="name another folder, or replace it with --force")
    names = [shard.name for shard in read_manifest(dest).shards]
    for name in (MANIFEST, *names):  # the manifest first: a folder without one is unfinished
        storage.remove(storage.join(dest, name))


def _shard_count(samples: int, shard_samples: int | None, size: int, format: Format) -> int:
    if shard_samples is not None:
        if shard_samples < 1:
            raise UserError(f"{shard_samples} samples a shard", where="--shard-samples", mend="use 1 or more")
        return -(-samples // shard_samples)
    most = min(4_096, max(64, int(_SHARD_BYTES / (_PIXEL_BYTES[format] * size * size))))
    return max(-(-samples // most), min(24, -(-samples // 64)))


def _stored(data: bytes, plan: PackPlan) -> tuple[str, bytes, bool]:
    """Extension and bytes to store, and whether these are the original ones."""
    kind, width, height = images.probe(data)
    pixels = images.decode(data, plan.size)
    if width == height == plan.size and kind in ("jpeg", plan.format):
        return ("jpg" if kind == "jpeg" else kind), data, True
    if plan.format == "png":
        return "png", images.encode_png(pixels), False
    return "jpg", images.encode_jpeg(pixels, plan.quality), False
