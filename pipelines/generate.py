"""Stage `generate`: draw analog clock faces into class folders, each rank its share."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from pipelines.stage import Stage, run_stage
from vqscale.data import clocks, images
from vqscale.errors import UserError

_CHUNK = 500  # images that are drawn at once


def main(stage: Stage) -> dict[str, Any]:
    """Draw the clock faces of a run; files that exist are kept."""
    counts = split_counts(stage)
    chunks = [(split, first) for split, count in counts.items() for first in range(0, count, _CHUNK)]
    mine = chunks[stage.ranks.rank :: stage.ranks.world]
    total, done, began = sum(counts.values()), 0, time.time()
    events = stage.events("images/s", total)
    for split, first in mine:
        count = min(_CHUNK, counts[split] - first)
        draw_files(stage, split, first, count)
        # Rank 0 speaks for all; its share is representative.
        done += count * stage.ranks.world
        if events:
            events.log(min(done, total), rate=done / (time.time() - began))
    if events:
        events.close()
    return {"images": total, "classes": len(clocks.CLASSES)}


def split_counts(stage: Stage) -> dict[str, int]:
    """Images of each split.

    Raises:
        UserError: the recipe draws no clocks.
    """
    settings = stage.recipe.data.clocks
    if settings is None:
        raise UserError("the recipe names shards and generates nothing", where="data.clocks")
    return {"train": settings.train, "validation": settings.validation}


def draw_files(stage: Stage, split: str, first: int, count: int) -> None:
    """Draw images `first` to `first + count - 1` of a split; files that exist are kept."""
    # Held-out clocks are drawn from a seed of their own.
    seed = (2 * stage.recipe.seed + (split == "validation")) % 2**63
    pixels, hours = clocks.draw(first, count, stage.recipe.data.image_size, seed)
    root = stage.layout.images(split)
    for name in {clocks.CLASSES[hour] for hour in hours.tolist()}:
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, (image, hour) in enumerate(zip(pixels, hours.tolist(), strict=True), start=first):
        path = root / clocks.CLASSES[hour] / f"{number:06d}.png"
        if not path.exists():
            _write(path, images.encode_png(image))


def _write(path: Path, content: bytes) -> None:
    """Under a temporary name, then renamed: a file that exists is whole."""
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


if __name__ == "__main__":
    run_stage("generate", main)
