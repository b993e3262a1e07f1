"""Stage `sample`: images from the prior, as PNG files and a labelled sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.stage import Stage, run_stage
from vqscale.data.images import encode_png
from vqscale.data.sheet import labelled_sheet
from vqscale.export import class_names, load_prior, load_tokenizer
from vqscale.files import write_bytes, write_json
from vqscale.sampling import draw_images
from vqscale.training.checkpoints.fitting import require_prior_of

SHEET_PER_CLASS = 12


def main(stage: Stage) -> dict[str, Any]:
    """Draw `sample.per_class` images of every class, each rank its share."""
    recipe, ranks, layout = stage.recipe, stage.ranks, stage.layout
    tokenizer, prior = load_tokenizer(layout.root, ranks.device), load_prior(layout.root, ranks.device)
    require_prior_of(tokenizer.fingerprint, layout.checkpoints(recipe, "prior"))
    names = class_names(layout, recipe)
    wanted = _labels(stage, names)
    mine = stage.share(len(wanted))
    events = stage.events("images/s", len(mine))
    for start in range(0, len(mine), recipe.sample.batch):
        numbers = mine[start : start + recipe.sample.batch]
        images = draw_images(prior, tokenizer, recipe.sample, [wanted[n] for n in numbers], numbers)
        for number, image in zip(numbers, images, strict=True):
            write_bytes(sample_path(layout.samples, names, wanted[number], number), encode_png(image))
        if events:
            events.log(start + len(numbers))
    if events:
        events.close()
    return {"samples": len(mine)}


def finish(stage: Stage, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw the sheet of all images, and list them."""
    layout, names = stage.layout, class_names(stage.layout, stage.recipe)
    wanted = _labels(stage, names)
    _write_sheet(layout.samples, names, wanted)
    files = [str(sample_path(Path(), names, c, n)) for n, c in enumerate(wanted)]
    write_json(layout.samples / "samples.json", {"classes": names, "labels": wanted, "files": files})
    return {"samples": len(wanted)}


def sample_path(folder: Path, names: tuple[str, ...], label: int, number: int) -> Path:
    """File of a sample: in a folder of its class where there are classes."""
    return folder / (names[label] if names else "") / f"{number:06d}.png"


def _labels(stage: Stage, names: tuple[str, ...]) -> list[int]:
    """Class of each sample; without classes the prior's own word for none, the number behind the last one."""
    each = stage.recipe.sample.per_class
    return [number // each if names else len(names) for number in range(each * max(1, len(names)))]


def _write_sheet(folder: Path, names: tuple[str, ...], wanted: list[int]) -> None:
    """A row a class, with its name."""
    rows: dict[int, list[np.ndarray]] = {}
    for number, label in enumerate(wanted):
        row = rows.setdefault(label, [])
        if len(row) < SHEET_PER_CLASS:
            row.append(np.asarray(Image.open(sample_path(folder, names, label, number))))
    sheet = labelled_sheet({names[label] if names else "": np.stack(row) for label, row in rows.items()})
    write_bytes(folder / "sheet.png", encode_png(sheet))


if __name__ == "__main__":
    run_stage("sample", main, finish)
