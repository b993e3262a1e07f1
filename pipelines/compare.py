"""Writes the comparison of a family's runs into its folder: `comparison.html`, `.json`, `.md` and `samples.png`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.arguments import OneLineParser
from vqscale.config.layout import RunLayout
from vqscale.data.drawn import RECORD, open_drawn
from vqscale.data.images import encode_png
from vqscale.data.sheet import labelled_sheet
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.evaluation.comparison import Outcome, comparison
from vqscale.evaluation.comparison_page import markdown, page
from vqscale.evaluation.markup import Picture
from vqscale.files import read_json, write_bytes, write_json
from vqscale.stages import TRAINED

COLUMNS = 12
SHEETS = {"Held-out images and their reconstructions": "reconstructions.png", "Drawn images": "sheet.png"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the comparison and return the exit code."""
    parser = OneLineParser(prog="python -m pipelines.compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of a family, with its family.json")
    try:
        write(parser.parse(list(sys.argv[1:] if arguments is None else arguments)).folder)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def write(folder: Path) -> None:
    """Write all files of the comparison, from what the runs have left so far.

    Raises:
        UserError: the folder holds no family.
    """
    record = read_json(folder / "family.json")
    if record is None:
        raise UserError("has no family.json", where=str(folder), mend="name the folder that `vqscale family` has made")
    facts = comparison(record, [_outcome(folder, member) for member in record["members"]])
    sheet = _sheet(folder, record["members"])
    pictures = [Picture("samples", "Samples, a column a class", sheet)] if sheet else []
    if sheet:
        write_bytes(folder / "samples.png", sheet)
    details = {member["name"]: _pictures(RunLayout(folder / member["run"])) for member in record["members"]}
    write_bytes(folder / "comparison.html", page(facts, pictures, details).encode())
    write_bytes(folder / "comparison.md", markdown(facts).encode())
    write_json(folder / "comparison.json", facts)  # last: with it all is there


def _outcome(folder: Path, member: dict[str, Any]) -> Outcome:
    layout = RunLayout(folder / member["run"])
    recipe = layout.read_recipe()
    markers = {stage: read_json(layout.done(stage)) for stage in recipe.stages}
    return Outcome(
        name=member["name"],
        about=member["about"],
        run=member["run"],
        state=member.get("state", "unknown"),
        message=member.get("message", ""),
        report=read_json(layout.report) or {},
        stages={stage: marker for stage, marker in markers.items() if marker},
        batches={stage: getattr(recipe, stage).training.global_batch for stage in TRAINED},
        shares=member.get("shares"),
    )


def _sheet(folder: Path, members: Sequence[dict[str, Any]]) -> bytes | None:
    """A row of samples for each member that has some, with one class in a column, as PNG."""
    rows: dict[str, NDArray[np.uint8]] = {}
    for member in members:
        layout = RunLayout(folder / member["run"])
        if (layout.samples / RECORD).exists():
            drawn = open_drawn(layout.samples)
            rows[member["name"]] = drawn.read(_by_turns(drawn.labels)[:COLUMNS])
    return encode_png(labelled_sheet(rows)) if rows else None


def _by_turns(labels: Sequence[int]) -> list[int]:
    """Numbers of all samples, the first of each class, then the second of each, and so on."""
    seen: dict[int, int] = {}
    turns = []
    for number, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        turns.append((seen[label], label, number))
    return [number for _, _, number in sorted(turns)]


def _pictures(layout: RunLayout) -> list[Picture]:
    found = {caption: layout.samples / name for caption, name in SHEETS.items()}
    return [Picture(path.stem, caption, path.read_bytes()) for caption, path in found.items() if path.exists()]


if __name__ == "__main__":
    sys.exit(main())
