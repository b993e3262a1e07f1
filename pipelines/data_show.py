"""`vqscale data show`: what shards hold, in words and as a sheet."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.data_report import line, megabytes, print_json, progress, some, summary
from vqscale import storage
from vqscale.data.manifest import IMAGES, Manifest
from vqscale.data.shards import ShardSet, open_shards
from vqscale.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

_TOP = 20  # classes that are listed; JSON has all
_KEYS = 3  # samples whose keys are shown
_SIZES = 5  # sizes of images that are listed
_SIDE = 128  # of images on a sheet when they vary
_SHEET_SHARDS = 8
_ROWS = 20  # classes that get a row each on a sheet; more stand side by side without names
_NAME = 24  # characters of a class's name on a sheet
_BAD = "(bad label)"
_NONE = "(none)"


def show(options: argparse.Namespace) -> int:
    """Say what shards hold: samples, classes, images, keys; --sheet writes some of the images as a picture."""
    if options.samples < 1:
        raise UserError(f"{options.samples} samples make no sheet", where="--samples", mend="use 1 or more")
    shards = open_shards(options.url)
    if shards.manifest.format != IMAGES:
        raise UserError("holds codes, not images", where=shards.spec, mend="look at them with `vqscale codes show`")
    first = _first_shard(shards)
    classes = class_counts(shards, partial(_count_images, shards))
    if options.sheet:
        storage.write_bytes(options.sheet, _sheet(shards, options.samples))
    if options.json:
        print_json({**summary(shards.manifest), **first, "class_counts": classes, "source": shards.manifest.source})
        return 0
    lines = [*_facts(shards.manifest), *_first_lines(first), *class_lines(classes)]
    print(line(shards.spec, shards.manifest), *(f"  {text}" for text in lines), sep="\n")
    if options.sheet:
        print(f"  sheet: {options.sheet}")
    return 0


def _facts(manifest: Manifest) -> list[str]:
    from vqscale.data.indexing.label_rules import described

    rule = f"labels: {described(manifest.label)}"
    return [f"format: {manifest.format}", rule, *source_lines(manifest), f"skipped: {manifest.skipped}"]


def source_lines(manifest: Manifest) -> list[str]:
    """Where the samples came from."""
    return [f"{name}: {_plain(value)}" for name, value in manifest.source.items()]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _first_shard(shards: ShardSet) -> dict[str, Any]:
    """Keys, members and images of the first shard that holds any samples."""
    from vqscale.data import tar
    from vqscale.data.indexing.survey import survey

    number = next((number for number, count in enumerate(shards.counts) if count), None)
    if number is None:
        return {"first_shard": "", "keys": {}, "images": {}}
    name, where = shards.name(number), shards.urls[number]
    buffer = storage.open_shard(where)
    samples, _ = tar.whole_samples(buffer, where)
    keys = {sample.key.encode(errors="replace").decode(): list(sample.fields) for sample in samples[:_KEYS]}
    headers = survey(where, name, label="none", hashes=False).headers
    images = {f"{form} of {width}×{height}": count for (form, width, height), count in headers.most_common()}
    return {"first_shard": name, "keys": keys, "images": images}


def _first_lines(first: dict[str, Any]) -> list[str]:
    keys = [f"{key} ({', '.join(f'.{extension}' for extension in members)})" for key, members in first["keys"].items()]
    images = [f"{count} {what}" for what, count in first["images"].items()]
    return [
        f"first shard: {first['first_shard']}",
        *([f"first keys: {', '.join(keys)}"] if keys else []),
        *([f"images that were looked at: {some(images, _SIZES)}"] if images else []),
    ]


def class_lines(counts: dict[str, int]) -> list[str]:
    """All classes in their order; of many the largest ones."""
    if len(counts) <= _TOP:
        return [f"class {name}: {count}" for name, count in counts.items()]
    top = Counter(counts).most_common(_TOP)
    missing = sum(count == 0 for count in counts.values())
    empty = f", {missing:,} of them without samples" if missing else ""
    more = f"and {len(counts) - _TOP:,} more{empty}"
    return [*(f"class {name}: {count}" for name, count in top), more]


def class_counts(shards: ShardSet, count: Callable[[int], Counter[int | str]]) -> dict[str, int]:
    """Samples of each class, from the labels in the shards.

    Args:
        shards: the shards.
        count: gives the labels of a shard, by its number.
    """
    from vqscale.data.threads import in_threads

    counts: Counter[int | str] = Counter()
    done, total = 0, shards.manifest.bytes
    with progress("counting", "MB") as report:
        tell = megabytes(report)
        for number, found in enumerate(in_threads(count, range(len(shards.urls)))):
            counts.update(found)
            done += shards.manifest.shards[number].bytes
            tell(done, total)
    names: dict[int | str, str] = {_BAD: _BAD, -1: _NONE, **dict(enumerate(shards.manifest.classes))}
    known = {name: counts.pop(label, 0) for label, name in names.items() if counts[label] or label not in (_BAD, -1)}
    return {**known, **{f"label {label}": count for label, count in sorted(counts.items()) if count}}


def _count_images(shards: ShardSet, number: int) -> Counter[int | str]:
    from vqscale.data import tar
    from vqscale.data.bad import BadSample
    from vqscale.data.labels import label_number, stored_label

    where, classes = shards.urls[number], shards.manifest.classes
    numbers = {name: label for label, name in enumerate(classes)}
    buffer = storage.open_shard(where)
    counts: Counter[int | str] = Counter()
    for sample in tar.whole_samples(buffer, where)[0][: shards.counts[number]]:
        try:
            counts[label_number(stored_label(buffer, sample, shards.labels[number]), classes, numbers)] += 1
        except BadSample:
            counts[_BAD] += 1
    return counts


def _sheet(shards: ShardSet, samples: int) -> bytes:
    """Images from some of the shards, evenly spread."""
    images, labels = _drawn(shards, samples)
    if not len(images):
        raise UserError("not one image can be decoded", where=shards.spec, mend="see `vqscale data verify --decode`")
    return arranged(images, labels, shards.manifest.classes)


def arranged(images: Pixels, labels: NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Images [n, S, S, 3] with labels [n] as a PNG: a row for each class, or side by side."""
    import numpy as np

    from vqscale.data.images import encode_png
    from vqscale.data.sheet import labelled_sheet, tile

    present = np.unique(labels)
    if not classes or len(present) > _ROWS:
        return encode_png(tile(images, columns=math.ceil(math.sqrt(len(images)))))
    names = {-1: _NONE, **dict(enumerate(classes))}
    return encode_png(labelled_sheet({_short(names[label]): images[labels == label] for label in present.tolist()}))


def _drawn(shards: ShardSet, samples: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Up to so many good images [n, S, S, 3] and their labels [n]."""
    import numpy as np

    from vqscale.data.image_source import ImageSource

    source = ImageSource(shards, shards.manifest.image_size or _SIDE)
    filled = [number for number, count in enumerate(shards.counts) if count]
    chosen = filled[:: -(-len(filled) // _SHEET_SHARDS) or 1]
    group = source.open_group(chosen)
    total = sum(shards.counts[number] for number in chosen)
    picks = np.unique(np.linspace(0, total - 1, min(samples, total)).astype(np.int64)) if total else np.arange(0)
    fields = {name: spec.empty(len(picks)) for name, spec in source.spec.items()}
    bad = [pick.place for pick in group.read(picks, fields, 0)]
    return np.delete(fields["image"], bad, axis=0), np.delete(fields["label"], bad)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
