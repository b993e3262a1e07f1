"""What a recipe reads, checked before anything starts: manifests, shard files, enough for the streams, weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from vqscale.config.recipe import Clocks, Recipe, Shards
from vqscale.data.manifest import IMAGES, Manifest, check_streams
from vqscale.data.shards import ShardSet, check_shards, open_shards
from vqscale.errors import UserError


def check_inputs(recipe: Recipe) -> list[str]:
    """Check the data that a recipe names, by manifests and file sizes alone, and that weights are there.

    Args:
        recipe: a valid recipe.

    Returns:
        Warnings, one line each.

    Raises:
        UserError: missing or unfit shards, or missing weights; names key or file, and the mend.
    """
    _check_weights(recipe)
    data = recipe.data
    if data.clocks:
        counts = _clock_counts(data.clocks)
        check_streams(counts, streams=data.streams, packet=data.packet, where="data.clocks.shards")
        return []
    train, validation = _read(data.train), _read(data.validation)
    shared = sorted(set(train.urls) & set(validation.urls))
    if shared:
        raise UserError(f"{shared[0]} is training data", where="data.validation", mend="name held-out shards")
    if not validation.manifest.samples:
        raise UserError("holds no samples", where=validation.spec, mend="pack with --holdout")
    if train.manifest.classes != validation.manifest.classes:
        raise UserError(
            f"{_classes(validation.manifest)}, but {train.spec} has {_classes(train.manifest)}",
            where=validation.spec,
            mend="pack both with one `vqscale data pack SRC DEST --holdout N`, or index both with the same classes",
        )
    check_streams(train.counts, streams=data.streams, packet=data.packet, where=train.spec)
    return [line for shards in (train, validation) for line in _size_warnings(shards, data.image_size)]


def _check_weights(recipe: Recipe) -> None:
    perceptual = recipe.tokenizer.losses.perceptual
    if perceptual:
        for path in perceptual.paths:
            if not Path(path).is_file():
                raise UserError(
                    f"no file {path}",
                    where="tokenizer.losses.perceptual.weights",
                    mend="name a file with the weights of VGG16 and LPIPS",
                )


def _read(spec: Shards) -> ShardSet:
    shards = open_shards(spec)
    if shards.manifest.format != IMAGES:
        raise UserError(
            f"holds {shards.manifest.format}, not images", where=shards.spec, mend="name a folder of image shards"
        )
    check_shards(shards)
    return shards


def _clock_counts(clocks: Clocks) -> list[int]:
    """Images of each training shard, as stage `pack` spreads them."""
    ends = [number * clocks.train // clocks.shards for number in range(clocks.shards + 1)]
    return [end - start for start, end in pairwise(ends)]


def _size_warnings(shards: ShardSet, wanted: int) -> list[str]:
    stored, url = shards.manifest.image_size, shards.spec
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
