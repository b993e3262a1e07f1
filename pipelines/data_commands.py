"""`vqscale data pack`, `index` and `verify`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data_report import Report, line, megabytes, print_json, progress, some, summary
from vqscale import storage
from vqscale.data.manifest import Manifest, Shard
from vqscale.data.shards import ShardSet, open_shards
from vqscale.errors import UserError

if TYPE_CHECKING:
    from vqscale.data.bad import BadPick
    from vqscale.data.indexing.index import Indexed

EXIT_FAULTS = 1
"""Exit code of `verify` and `index` when shards are damaged or hold bad images."""

_RECIPE = Path(__file__).with_name("recipes") / "cifar10.yaml"
"""What packed images are trained with."""
_LISTED = 100  # bad samples that are printed; JSON has all


def pack(options: argparse.Namespace) -> int:
    """Cut images to their centre square, resize them, and write mixed shards with a manifest.

    JPEGs that have the size already are stored byte for byte. Unreadable files are counted and listed in
    DEST/skipped.txt.
    """
    from vqscale.data.pack import SKIPPED, pack_images
    from vqscale.data.scan import are_parts

    with progress("packing", "images") as report:
        manifests = pack_images(
            options.src,
            options.dest,
            size=options.size,
            format=options.format,
            quality=options.quality,
            shard_samples=options.shard_samples,
            holdout=options.holdout,
            workers=options.workers,
            seed=options.seed,
            force=options.force,
            classes=() if options.no_classes else None,
            progress=report,
        )
    if options.json:
        print_json({url: summary(manifest) for url, manifest in manifests.items()})
    else:
        for url, manifest in manifests.items():
            print(line(url, manifest))
            if manifest.skipped:
                files = "file was" if manifest.skipped == 1 else "files were"
                print(f"  {manifest.skipped} {files} left out, see {storage.join(url, SKIPPED)}")
        print(_next_steps(manifests, options), flush=True)
    classes = next(iter(manifests.values())).classes
    if are_parts(classes):
        print(_parts_warning(classes, options.src), file=sys.stderr)
    return 0


def _parts_warning(classes: Sequence[str], src: Path) -> str:
    alone = src / classes[0] if (src / classes[0]).is_dir() else f"its folder {classes[0]}"
    return (
        f"warning: {src}: its folders {', '.join(classes)} have become the classes; "
        f"if they are parts of a data set, pack one alone ({alone}), or all with --no-classes"
    )


def _next_steps(manifests: Mapping[str, Manifest], options: argparse.Namespace) -> str:
    """A command that trains on what was packed, with as many streams as there are shards for."""
    if len(manifests) == 1:
        return (
            f"look at them with `vqscale data show {next(iter(manifests))}`; --holdout N also writes validation shards"
        )
    from vqscale.config.load import load_recipe

    stem = options.src.resolve().name.removesuffix(".gz").removesuffix(".tar")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-_.")[:64] or "mine"
    words = [_RECIPE.stem, f"name={name}", f"data.image_size={options.size}"]
    words += [f"data.{Path(url).name}={url}" for url in manifests]
    shards = min(len(manifest.shards) for url, manifest in manifests.items() if Path(url).name == "train")
    if shards < load_recipe(_RECIPE).data.streams:
        words += [f"data.streams={shards - shards % 2}"] if shards > 1 else ["data.streams=1", "resources.processes=1"]
    return f"now train on them:\n  {shlex.join(['vqscale', 'submit', *words])}"


def index(options: argparse.Namespace) -> int:
    """Read shards that other tools wrote, find labels and classes, and write manifest.json beside them.

    Several folders get a manifest each, with the same classes; with --out all get one. Shards that are cut off or
    damaged are named, and nothing is written (exit code 1), unless --keep-damaged is given.
    """
    from vqscale.data.indexing.index import classes_of, index_shards, read_classes, write_index

    classes = read_classes(options.classes) if options.classes else ()
    with progress("indexing", "MB") as report:
        found = index_shards(
            options.url,
            label=options.label,
            classes=classes_of(options.classes_from) if options.classes_from else classes,
            hashes=not options.no_hash,
            out=options.out,
            force=options.force,
            progress=megabytes(report),
            **threads(options),
        )
    refused = any(one.damaged for one in found) and not options.keep_damaged
    for one in found:
        if not refused:
            write_index(one)
    if options.json:
        print_json([_index_summary(one, not refused) for one in found])
    else:
        print(*(text for one in found for text in _index_lines(one, not refused)), sep="\n")
    return EXIT_FAULTS if refused else 0


def _index_summary(one: Indexed, written: bool) -> dict[str, Any]:
    more = {"manifest": one.where, "written": written, "damaged": one.damaged}
    return {**more, **summary(one.manifest), "source": one.manifest.source}


def _index_lines(one: Indexed, written: bool) -> list[str]:
    lines = [f"{name}: {why}" for name, why in one.damaged.items()]
    if not written:
        count = f"{len(one.damaged)} of {len(one.manifest.shards)} shards are damaged"
        mend = "copy them again, or give --keep-damaged to use what is whole of them"
        return [*lines, f"{one.where}: not written, {count}; {mend}"] if one.damaged else lines
    return [*lines, line(one.where, one.manifest), *(f"  {text}" for text in _findings(one))]


def _findings(one: Indexed) -> list[str]:
    """What was found and decided, and what may be a fault."""
    from vqscale.data.indexing.label_rules import described

    manifest, source = one.manifest, one.manifest.source
    kinds = ", ".join(f"{count:,} .{extension}" for extension, count in source["images"].items())
    bad, strange = source.get("bad_labels", 0), source.get("bad_label_examples")
    unlabelled = 0 if manifest.label == "none" else manifest.samples - source["labelled"] - bad
    examples = f", such as {', '.join(strange)}, which are none of the classes" if strange else ""
    return [
        f"images: {kinds}",
        f"labels: {described(manifest.label)} ({source['label_reason']})",
        *([f"classes: {some(list(manifest.classes), 8)}"] if manifest.classes else []),
        *_if(unlabelled, "have no label"),
        *_if(bad, f"have a bad label{examples}"),
        *_if(source.get("without_image", 0), f"have no image, such as {source.get('without_image_example')}"),
        *_if(source.get("unsafe_keys", 0), "have an absolute key, or one that leads to a parent folder"),
        *_if(source.get("headers_unreadable", 0), f"of {source['headers_read']:,} images looked at have no header"),
    ]


def _if(count: int, text: str) -> list[str]:
    return [f"{count:,} {text}"] if count else []


def verify(options: argparse.Namespace) -> int:
    """Read every shard and compare size, sha256 and number of samples with the manifest.

    With --decode, every image is decoded as for training. Ends with exit code 1 when there are faults or bad samples.
    """
    from vqscale.data.verify import verify as check

    shards = open_shards(options.url)
    bad: list[BadPick] | None = [] if options.decode else None
    with progress("verifying", "MB") as report:
        faults = check(shards, by_shard(shards, megabytes(report)), bad=bad, **threads(options))
    kinds = Counter(pick.kind for pick in bad or ())
    if options.json:
        result = {"shards": len(shards.urls), "samples": shards.manifest.samples, "faults": faults}
        decoded = {"bad": dict(kinds), "bad_samples": [[pick.shard, pick.key, pick.kind] for pick in bad or ()]}
        print_json(result | decoded if options.decode else result)
    else:
        print(*faults, *_bad_lines(bad or []), _outcome(shards, faults, kinds, options.decode), sep="\n")
    return EXIT_FAULTS if faults or bad else 0


def by_shard(shards: ShardSet, report: Report) -> Callable[[Shard], None]:
    """Reports the bytes of shard after shard."""
    done = 0

    def count(shard: Shard) -> None:
        nonlocal done
        done += shard.bytes
        report(done, shards.manifest.bytes)

    return count


def _bad_lines(bad: list[BadPick]) -> list[str]:
    lines = [f"{pick.shard}: {pick.key}: {pick.kind}".encode(errors="replace").decode() for pick in bad]
    return [*lines[:_LISTED], *([f"and {len(lines) - _LISTED:,} more; --json has all"] if len(lines) > _LISTED else [])]


def _outcome(shards: ShardSet, faults: list[str], kinds: Counter[str], decoded: bool) -> str:
    from vqscale.data.bad import KINDS

    total, unhashed = len(shards.urls), sum(not shard.sha256 for shard in shards.manifest.shards)
    what = f"{len(faults)} of {total} shards have faults" if faults else f"{total} shards are as their manifest says"
    text = f"{shards.spec}: {what}"
    if unhashed:
        text += f" ({unhashed} without a sha256 to compare)"
    if decoded:
        counts = "; ".join(f"{count} {kind}: {KINDS[kind]}" for kind, count in kinds.most_common())
        text += f", {kinds.total()} of {shards.manifest.samples:,} samples are bad" + (f" ({counts})" if counts else "")
    return text


def threads(options: argparse.Namespace) -> dict[str, int]:
    """The option --threads as an argument; none where it was not given.

    Raises:
        UserError: it is less than one.
    """
    if options.threads is None:
        return {}
    if options.threads < 1:
        raise UserError(f"{options.threads} threads read nothing", where="--threads", mend="use 1 or more")
    return {"threads": options.threads}
