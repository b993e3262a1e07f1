"""Manifests of shards that other tools wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vqscale import storage
from vqscale.data.indexing.label_rules import Decision, check_rule, count, decide
from vqscale.data.indexing.listing import Listed, below_one_folder, list_shards
from vqscale.data.indexing.survey import Survey, survey
from vqscale.data.manifest import IMAGES, MANIFEST, Manifest
from vqscale.data.shards import open_shards
from vqscale.data.threads import THREADS, in_threads
from vqscale.errors import UserError

Progress = Callable[[int, int], None]


class Indexed(NamedTuple):
    """A manifest that has not been written yet."""

    manifest: Manifest
    where: str
    """Path or URL of its file."""
    damaged: dict[str, str]
    """Shard → what is wrong with it."""


def index_shards(
    specs: str | Sequence[str],
    *,
    label: str = "auto",
    classes: Sequence[str] = (),
    hashes: bool = True,
    out: str = "",
    force: bool = False,
    threads: int = THREADS,
    progress: Progress | None = None,
) -> list[Indexed]:
    """Read shards and say what is in them; writes nothing.

    Args:
        specs: what `listing.list_shards` takes.
        label: where labels are (`Manifest.label`), or `auto` (`label_rules.decide`).
        classes: names of the labels 0, 1, ...; by default what is found, over all that is named.
        hashes: compute SHA-256, for which local shards have to be read whole.
        out: file of one manifest for all; by default each folder of `listing.list_shards` gets its own.
        force: whether a manifest may be there already.
        threads: shards that are read at the same time.
        progress: called with bytes done and bytes in all.

    Returns:
        A manifest for each folder, with the same label rule and the same classes.

    Raises:
        UserError: nothing there, a manifest that is there already, no images, or labels that cannot be had.
    """
    check_rule(label)
    if out and not out.endswith(".json"):
        raise UserError("is no name of a manifest", where=f"--out {out}", mend="let it end in .json")
    listed = list_shards([specs] if isinstance(specs, str) else specs)
    if out:
        listed = [below_one_folder(listed)]
    places = [out or storage.join(part.folder, MANIFEST) for part in listed]
    for place in places:
        _check_free(place, force)
    surveys = _read(listed, label, hashes, threads, progress)
    whole = Survey()
    for found in surveys:
        whole.merge(found)
    if not whole.images:
        raise _no_images(listed, whole)
    decision = decide(label, whole.labels, whole.samples, classes)
    return [
        Indexed(_manifest(found, _base(place, part.folder) if out else "", decision, part), place, found.damaged)
        for place, part, found in zip(places, listed, surveys, strict=True)
    ]


def write_index(indexed: Indexed) -> None:
    """Write the manifest, atomically."""
    text = json.dumps(indexed.manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    storage.write_bytes(indexed.where, (text + "\n").encode())


def read_classes(where: str) -> tuple[str, ...]:
    """Names of classes from a text file with one on each line.

    Raises:
        UserError: it is absent, empty, or names one twice.
    """
    try:
        names = storage.read_bytes(where).decode().splitlines()
    except UnicodeDecodeError:
        raise UserError("is no text in UTF-8", where=where, mend="write one name a line") from None
    classes = tuple(name.strip() for name in names if name.strip())
    if not classes or len(set(classes)) < len(classes):
        twice = next((name for at, name in enumerate(classes) if name in classes[:at]), "")
        raise UserError(
            f"names '{twice}' twice" if twice else "names no classes", where=where, mend="write one name a line"
        )
    return classes


def classes_of(spec: str) -> tuple[str, ...]:
    """The classes of shards that have a manifest.

    Raises:
        UserError: they have none.
    """
    classes = open_shards(spec).manifest.classes
    if not classes:
        raise UserError("has no classes", where=spec, mend="name a manifest that has some, or use --classes FILE")
    return classes


def _check_free(place: str, force: bool) -> None:
    if not force and storage.size(place) is not None:
        raise UserError(
            "is there already",
            where=place,
            mend="give --force to replace it by one that lists these shards alone, or --out FILE.json to write another",
        )


def _read(listed: Sequence[Listed], label: str, hashes: bool, threads: int, progress: Progress | None) -> list[Survey]:
    """What the shards of each folder hold."""
    shards = [(at, *place) for at, part in enumerate(listed) for place in zip(part.urls, part.names, strict=True)]
    sizes = _present([url for _, url, _ in shards], threads)
    surveys, done = [Survey() for _ in listed], 0

    def read(shard: tuple[int, str, str]) -> Survey:
        return survey(*shard[1:], label=label, hashes=hashes)

    for (at, *_), size, found in zip(shards, sizes, in_threads(read, shards, threads), strict=True):
        surveys[at].merge(found)
        done += size
        if progress:
            progress(done, sum(sizes))
    return surveys


def _present(urls: Sequence[str], threads: int) -> list[int]:
    """Sizes of shards that all have to be there."""
    found = list(in_threads(storage.size, urls, threads))
    absent = [url for url, size in zip(urls, found, strict=True) if size is None]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"{len(absent)} of {len(urls)} shards are missing: {', '.join(absent[:3])}{more}",
            mend="correct the pattern, or copy them again",
        )
    return [size or 0 for size in found]


def _base(place: str, folder: str) -> str:
    """What a manifest says of the place of its shards; nothing where they lie beside it, so that both can be moved."""
    local = storage.local_path(place)
    own = os.path.dirname(os.path.abspath(local)) if local else place.rpartition("/")[0]
    if own == folder:
        return ""
    if storage.shown(folder) != folder:
        raise UserError("the manifest would hold a secret", where=storage.shown(folder), mend="leave --out away")
    return folder


def _manifest(found: Survey, base: str, decision: Decision, part: Listed) -> Manifest:
    return Manifest(
        format=IMAGES,
        shards=tuple(found.shards),
        base=base,
        label=decision.rule,
        classes=decision.classes,
        image_size=found.image_size(),
        source=_source(found, decision, part),
    )


def _source(found: Survey, decision: Decision, part: Listed) -> dict[str, Any]:
    """What is worth knowing later of what was found, and what was decided."""
    counts = count(decision, found.labels)
    source: dict[str, Any] = {
        "indexed_from": storage.shown(part.folder),
        "images": dict(found.images.most_common()),
        "headers_read": found.headers.total() + found.unreadable,
        "label_reason": decision.why,
        "labelled": counts.labelled,
    }
    faults = {
        "without_image": found.without,
        "without_image_example": found.example,
        "headers_unreadable": found.unreadable,
        "unsafe_keys": found.unsafe,
        "bad_labels": counts.bad,
        "bad_label_examples": list(counts.strange),
        "damaged": found.damaged,
    }
    return source | {name: value for name, value in faults.items() if value}


def _no_images(listed: Sequence[Listed], whole: Survey) -> UserError:
    where = ", ".join(part.folder for part in listed)
    if whole.damaged and not whole.samples:
        name, why = next(iter(whole.damaged.items()))
        return UserError(f"not one whole sample; {name} {why}", where=where, mend="unpack or copy the shards again")
    if not whole.samples:
        return UserError("holds no samples", where=where, mend="name shards that hold some")
    return UserError(
        f"not one of {whole.samples:,} samples has an image, such as {whole.example}",
        where=where,
        mend="images are members that end in .jpg, .jpeg, .png or .webp",
    )
