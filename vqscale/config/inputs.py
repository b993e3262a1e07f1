"""What a recipe reads, checked before anything starts: manifests, shard files, enough for the streams, weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from vqscale.config.recipe import Clocks, Recipe
from vqscale.config.section import Places
from vqscale.data.manifest import CODES, IMAGES, Manifest, check_streams
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
    data = recipe.data
    if data.codes:
        check_codes(recipe, data.code_shards("train"), data.code_shards("validation"))
        return []
    _check_weights(recipe)
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
    require_room(recipe, train)
    return [line for shards in (train, validation) for line in _size_warnings(shards, data.image_size)]


def check_codes(recipe: Recipe, train_at: str, validation_at: str) -> str | None:
    """Whether code shards are there, go together, and feed the streams.

    Returns:
        Fingerprint of the tokenizer that made them.

    Raises:
        UserError: missing or unfit shards; names key or file, and the mend.
    """
    train, validation = open_shards(train_at), open_shards(validation_at)
    for shards in (train, validation):
        check_levels(recipe, shards)
        check_shards(shards)
    theirs, ours = validation.manifest, train.manifest
    if (theirs.fingerprint, theirs.classes) != (ours.fingerprint, ours.classes):
        mend = "pull both from one run"
        raise UserError(f"has another tokenizer or other classes than {train.spec}", where=validation.spec, mend=mend)
    if not theirs.samples:
        raise UserError("holds no samples", where=validation.spec, mend="pull held-out codes too")
    check_streams(train.counts, streams=recipe.data.streams, packet=recipe.data.packet, where=train.spec)
    return ours.fingerprint


def check_images(shards: Places) -> None:
    """Whether image shards are there, by their manifest and the sizes of the files.

    Raises:
        UserError: names what is missing.
    """
    _read(shards)


def check_levels(recipe: Recipe, shards: ShardSet) -> None:
    """Whether code shards have the levels of the recipe.

    Raises:
        UserError: they hold no codes, or those of other levels.
    """
    manifest = shards.manifest
    if manifest.format != CODES:
        raise UserError(f"holds {manifest.format}, not codes", where=shards.spec, mend="name a folder of code shards")
    if manifest.levels != recipe.levels:
        theirs, ours = (", ".join(map(str, levels)) for levels in (manifest.levels, recipe.levels))
        mend = "give data.image_size and tokenizer of the recipe that made them"
        raise UserError(f"holds {theirs}, but the recipe has {ours}", where=shards.spec, mend=mend)


def require_room(recipe: Recipe, shards: ShardSet) -> None:
    """Whether squares can be cut from stored images, where the recipe wants several.

    Raises:
        UserError: they are stored at the size of the squares, or smaller.
    """
    stored, size = shards.manifest.image_size, recipe.data.image_size
    if recipe.extract.crops > 1 and stored is not None and stored <= size:
        what = f"{recipe.extract.crops} squares of {size} pixels cannot be cut from images of {stored} in {shards.spec}"
        raise UserError(what, where="extract.crops", mend="pack them larger, or use 1")


def _check_weights(recipe: Recipe) -> None:
    for key, paths in recipe.tokenizer.weights.items():
        for path in paths:
            if not Path(path).is_file():
                raise UserError(f"no file {path}", where=key, mend="name a file with the weights of VGG16 and LPIPS")


def _read(spec: Places) -> ShardSet:
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
