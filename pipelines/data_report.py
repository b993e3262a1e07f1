"""What the commands of `vqscale data` print: progress, one line on a manifest, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vqscale.data.manifest import IMAGES, Manifest

Report = Callable[[int, int], None]
"""Takes what is done and what there is in all."""


def line(name: str, manifest: Manifest) -> str:
    """How much of what shards hold."""
    size = f"{manifest.image_size}×{manifest.image_size}" if manifest.image_size else ""
    if manifest.format == IMAGES:
        what = f"images of {size}" if size else "images"
    else:
        what = f"code grids of {size} images" if size else "code grids"
    kinds = f" in {len(manifest.classes)} classes" if manifest.classes else ""
    return f"{name}: {manifest.samples:,} {what}{kinds}, {len(manifest.shards)} shards, {manifest.bytes / 1e6:,.1f} MB"


def summary(manifest: Manifest) -> dict[str, Any]:
    """The same for JSON, with the names of the classes."""
    return {
        "format": manifest.format,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "bytes": manifest.bytes,
        "image_size": manifest.image_size,
        "label": manifest.label,
        "classes": list(manifest.classes),
        "skipped": manifest.skipped,
    }


def some(names: list[str], most: int) -> str:
    """Names in a row; of many the first ones, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def print_json(value: Any) -> None:
    """Print JSON, indented."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def progress(verb: str, unit: str) -> Iterator[Report]:
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


def megabytes(report: Report) -> Report:
    """Reports bytes in whole MB."""
    return lambda done, total: report(done >> 20, total >> 20)


def _plain_lines(verb: str, unit: str) -> Report:
    said = -1

    def report(done: int, total: int) -> None:
        nonlocal said
        tenth = 10 * done // total if total else 10
        if tenth > said:
            said = tenth
            print(f"{verb}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    return report
