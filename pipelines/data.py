"""`vqscale data`: image folders and archives into shards, and what is in them."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqscale.arguments import OneLineParser, choose_command
from vqscale.data import storage
from vqscale.data.manifest import IMAGES, Manifest, Shard, read_manifest, verify
from vqscale.errors import EXIT_USER_ERROR, UserError

EXIT_FAULTS = 1
"""Exit code of `verify` when it finds faults."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vqscale data` and return its exit code."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    return commands[choose_command(parser, commands, arguments)].parse(arguments[1:])


def _parsers() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """The parser of `vqscale data`, and those of its commands by name."""
    parser = OneLineParser(
        prog="vqscale data", description="Image folders and archives into shards, and what is in them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    _add_pack(commands.add_parser("pack", help="pack images into WebDataset shards", description=_pack.__doc__))
    check = commands.add_parser("verify", help="compare shards with their manifest", description=_verify.__doc__)
    check.add_argument("url", metavar="URL", help="folder of shards with a manifest.json")
    check.set_defaults(run=_verify)
    show = commands.add_parser("show", help="say what shards hold", description=_show.__doc__)
    show.add_argument("url", metavar="URL", help="folder of shards with a manifest.json")
    show.add_argument("--sheet", type=Path, metavar="PNG", help="write some images side by side into this file")
    show.add_argument("--samples", type=int, default=64, metavar="N", help="images on the sheet (default: 64)")
    show.set_defaults(run=_show)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser, dict(commands.choices)


def _add_pack(pack: argparse.ArgumentParser) -> None:
    pack.add_argument("src", type=Path, metavar="SRC", help="folder of class folders, or a tar or tar.gz of one")
    pack.add_argument("dest", metavar="DEST", help="folder or URL for the shards")
    pack.add_argument("--size", type=int, required=True, metavar="S", help="side of the stored square images")
    pack.add_argument(
        "--holdout",
        type=int,
        default=0,
        metavar="N",
        help="hold out N images: writes DEST/train and DEST/validation",
    )
    pack.add_argument("--format", choices=("jpeg", "png"), default="jpeg", help="png is lossless (default: jpeg)")
    pack.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEGs, stored as 4:4:4 (default: 95)")
    pack.add_argument(
        "--shard-samples",
        type=int,
        metavar="N",
        help="images a shard (default: about 64 MB, 24 shards or more)",
    )
    pack.add_argument("--seed", type=int, default=0, help="of the shuffle and the held-out images (default: 0)")
    pack.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: all cores)",
    )
    pack.add_argument("--force", action="store_true", help="replace shards that DEST holds already")
    pack.set_defaults(run=_pack)


def _pack(options: argparse.Namespace) -> int:
    """Cut images to their centre square, resize them, and write mixed shards with a manifest.

    JPEGs that have the size already are stored byte for byte. Unreadable files are counted and listed in
    DEST/skipped.txt.
    """
    from vqscale.data.pack import SKIPPED, pack_images

    with _progress("packing", "images") as report:
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
            progress=report,
        )
    if options.json:
        _print_json({url: _summary(manifest) for url, manifest in manifests.items()})
        return 0
    for url, manifest in manifests.items():
        print(_line(url, manifest))
        if manifest.skipped:
            print(f"  {manifest.skipped} files were left out, see {storage.join(url, SKIPPED)}")
    print(_next_steps(list(manifests), options))
    return 0


def _next_steps(urls: list[str], options: argparse.Namespace) -> str:
    if len(urls) == 1:
        return f"look at them with `vqscale data show {urls[0]}`; --holdout N also writes validation shards"
    keys = (f"data.{Path(url).name}={url}" for url in urls)
    head = "now train on them, with these settings of the recipe:"
    return "\n  ".join([head, f"data.image_size={options.size}", *keys])


def _verify(options: argparse.Namespace) -> int:
    """Read every shard and compare size, sha256 and number of samples with the manifest."""
    manifest = read_manifest(options.url)
    done = 0
    with _progress("verifying", "MB") as report:

        def count(shard: Shard) -> None:
            nonlocal done
            done += shard.bytes
            report(done >> 20, manifest.bytes >> 20)

        faults = verify(options.url, manifest, count)
    if options.json:
        _print_json({"shards": len(manifest.shards), "samples": manifest.samples, "faults": faults})
    else:
        print(
            *(faults or [f"{options.url}: {len(manifest.shards)} shards are as their manifest says"]),
            sep="\n",
        )
    return EXIT_FAULTS if faults else 0


def _show(options: argparse.Namespace) -> int:
    """Say how many samples of which classes shards hold; --sheet writes some of them as a picture."""
    manifest = read_manifest(options.url)
    classes = _class_counts(options.url, manifest)
    if options.sheet:
        _write_sheet(options.url, manifest, options.sheet, options.samples)
    if options.json:
        _print_json({**_summary(manifest), "class_counts": classes, "source": manifest.source})
        return 0
    print(_line(options.url, manifest))
    for name, value in manifest.source.items():
        print(f"  {name}: {value}")
    print(f"  skipped: {manifest.skipped}")
    for level in manifest.levels:
        print(f"  level {level.name}: {level.grid}×{level.grid} of {level.codes} codes")
    for name, count in classes.items():
        print(f"  class {name}: {count}")
    if options.sheet:
        print(f"  sheet: {options.sheet}")
    return 0


def _class_counts(url: str, manifest: Manifest) -> dict[str, int]:
    """Samples of each class, from the labels in the shards."""
    counts: Counter[int] = Counter()
    for shard in manifest.shards:
        counts.update(_labels(storage.join(url, shard.name), manifest))
    names = {-1: "(none)", **dict(enumerate(manifest.classes))}
    known = {name: counts.pop(label) for label, name in names.items() if counts[label] or label >= 0}
    return {**known, **{f"label {label}": count for label, count in sorted(counts.items()) if count}}


def _labels(where: str, manifest: Manifest) -> list[int]:
    if manifest.format == IMAGES:
        from vqscale.data.images import read_labels

        return read_labels(where)
    from vqscale.data.codes import read_code_shard

    return [int(label) for label in read_code_shard(where)["label"]]


def _write_sheet(url: str, manifest: Manifest, path: Path, samples: int) -> None:
    """The first images of the data set (which is shuffled), side by side."""
    import numpy as np

    from vqscale.data.images import ImageSource, encode_png
    from vqscale.data.sheet import tile

    if samples < 1:
        raise UserError(f"{samples} samples make no sheet", where="--samples", mend="use 1 or more")
    source = ImageSource(url, manifest, manifest.image_size or 128)
    images: list[Any] = []
    for shard in range(len(manifest.shards)):
        if len(images) < samples:
            fields, _ = next(source.read_shard(shard, samples - len(images), []), ({"image": []}, []))
            images.extend(fields["image"])
    storage.write_bytes(path, encode_png(tile(np.stack(images), columns=math.ceil(math.sqrt(len(images))))))


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "format": manifest.format,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": manifest.bytes,
        "image_size": manifest.image_size,
        "classes": list(manifest.classes),
        "skipped": manifest.skipped,
    }


def _line(url: str, manifest: Manifest) -> str:
    size = f"{manifest.image_size}×{manifest.image_size}" if manifest.image_size else ""
    if manifest.format == IMAGES:
        what = f"images of {size}" if size else "images"
    else:
        what = f"code grids of {size} images" if size else "code grids"
    kinds = f" in {len(manifest.classes)} classes" if manifest.classes else ""
    return f"{url}: {manifest.samples:,} {what}{kinds}, {len(manifest.shards)} shards, {manifest.bytes / 1e6:,.1f} MB"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def _progress(verb: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a plain line each tenth of the way, on standard error."""
    if not sys.stderr.isatty():
        yield _plain_lines(verb, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_lines(verb: str, unit: str) -> Callable[[int, int], None]:
    said = -1

    def report(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // total if total else 10
        if tenth > said:
            said = tenth
            print(f"{verb}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
