"""What a recipe reads, checked before anything starts: manifests, shard files, enough for the streams."""

from __future__ import annotations

from itertools import pairwise

from vqscale.config.recipe import Clocks, Recipe
from vqscale.data.manifest import IMAGES, Manifest, check_shards, check_streams, read_manifest
from vqscale.errors import UserError


def check_inputs(recipe: Recipe) -> list[str]:
    """Check the data that a recipe names, by manifests and file sizes alone.

    Args:
        recipe: a valid recipe.

    Returns:
        Warnings, one line each.

    Raises:
        UserError: missing or unfit shards; names key or file, and the mend.
    """
    data = recipe.data
    if data.clocks:
        counts = _clock_counts(data.clocks)
        check_streams(counts, streams=data.streams, packet=data.packet, where="data.clocks.shards")
        return []
    train, validation = _read(data.train), _read(data.validation)
    if data.train.rstrip("/") == data.validation.rstrip("/"):
        raise UserError("is the training data itself", where="data.validation", mend="name held-out shards")
    if not validation.samples:
        raise UserError("holds no samples", where=data.validation, mend="pack with --holdout")
    if train.classes != validation.classes:
        raise UserError(
            f"{_classes(validation)}, but {data.train} has {_classes(train)}",
            where=data.validation,
            mend="pack both with one `vqscale data pack SRC DEST --holdout N`",
        )
    check_streams(train.counts, streams=data.streams, packet=data.packet, where=data.train)
    pairs = ((data.train, train), (data.validation, validation))
    return [line for url, manifest in pairs for line in _size_warnings(url, manifest, data.image_size)]


def _read(url: str) -> Manifest:
    manifest = read_manifest(url)
    if manifest.format != IMAGES:
        raise UserError(f"holds {manifest.format}, not images", where=url, mend="name a folder of image shards")
    check_shards(url, manifest)
    return manifest


def _clock_counts(clocks: Clocks) -> list[int]:
    """Images of each training shard, as stage `pack` spreads them."""
    ends = [number * clocks.train // clocks.shards for number in range(clocks.shards + 1)]
    return [end - start for start, end in pairwise(ends)]


def _size_warnings(url: str, manifest: Manifest, wanted: int) -> list[str]:
    stored = manifest.image_size
    if stored is None or stored == wanted:
        return []
    if stored < wanted:
        return [f"{url}: images are stored at {stored} pixels and enlarged to data.image_size {wanted}"]
    return [f"{url}: images are resized from {stored} to {wanted} while training; pack at {wanted} to save time"]


def _classes(manifest: Manifest) -> str:
    names = manifest.classes
    if not names:
        return "has no classes"
    more = ", ..." if len(names) > 4 else ""
    return f"has {len(names)} classes ({', '.join(names[:4])}{more})"
