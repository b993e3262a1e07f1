"""What the stage `sample` and the command `vqscale sample` share: filling a folder with drawn images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vqscale.config.recipe import Sample
from vqscale.data.drawn import DrawnSet, write_parts
from vqscale.data.images import encode_png
from vqscale.data.sheet import labelled_sheet
from vqscale.files import write_bytes
from vqscale.loading import TrainedTokenizer
from vqscale.models.prior import Prior
from vqscale.training.checkpoints.reader import content_hash

SHEET, SHEET_CLASSES, SHEET_PER_CLASS = "sheet.png", 32, 12

Report = Callable[[int, float | None], None]
"""Told how many of this process's images are there, and images a second."""


class Together(Protocol):
    """The processes that fill a folder together, as `Ranks`."""

    @property
    def first(self) -> bool:
        """Whether this is the one that does what is done once."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
        ...


def fill(
    drawn: DrawnSet,
    ranks: Together,
    mine: Sequence[int],
    batch: int,
    draw: Callable[[Sequence[int]], NDArray[np.uint8]],
    report: Report,
    *,
    replace: bool = True,
) -> None:
    """Draw what is missing of this process's parts; every process calls it.

    Args:
        drawn: the set.
        ranks: the processes that share it.
        mine: parts that are this process's own.
        batch: images that are drawn at once.
        draw: from numbers to images uint8 [n, S, S, 3].
        report: called after every batch.
        replace: whether another drawing may be replaced.

    Raises:
        UserError: the folder holds another drawing, which may not be replaced.
    """
    finished = drawn.is_finished()
    ranks.barrier()  # nobody changes anything before all have looked
    if finished:
        return
    if ranks.first:
        drawn.prepare(replace=replace)
        (drawn.folder / SHEET).unlink(missing_ok=True)
    ranks.barrier()
    _draw_missing(drawn, mine, batch, draw, report)
    ranks.barrier()


def conclude(drawn: DrawnSet, picture: Callable[[DrawnSet], NDArray[np.uint8]] | None = None) -> None:
    """When all parts are there: make the whole of them, and put a sheet beside it. Does nothing a second time.

    Args:
        drawn: the set.
        picture: makes the sheet uint8 [H, W, 3] of the finished set; None is `sheet_of`.

    Raises:
        UserError: a part is missing.
    """
    if not drawn.is_finished():
        drawn.finish()
    sheet = drawn.folder / SHEET
    if not sheet.exists():
        write_bytes(sheet, encode_png((picture or sheet_of)(drawn)))


def drawn_set(
    folder: Path,
    settings: Sample,
    names: tuple[str, ...],
    labels: tuple[int, ...],
    tokenizer: TrainedTokenizer,
    prior: Prior,
    known: str = "",
) -> DrawnSet:
    """The images to be drawn, and what they follow from.

    Args:
        folder: for them.
        settings: how they are drawn.
        names: of all classes.
        labels: class of each image; -1 for none.
        tokenizer: decodes them.
        prior: draws their codes.
        known: hash of the codes that are known of them; empty where none are.
    """
    numbers = {"batch", "output", "count", "per_class", "classes"}  # in `labels` and `output`, or without influence
    drawn_from = {
        "tokenizer": tokenizer.fingerprint,
        "prior": content_hash(prior.state_dict()),
        "settings": settings.model_dump(mode="json", exclude=numbers),
        **({"known": known} if known else {}),
    }
    return DrawnSet(folder, settings.output, tokenizer.image_size, names, labels, drawn_from)


def sheet_of(drawn: DrawnSet) -> NDArray[np.uint8]:
    """A row of images a class with its name, uint8 [H, W, 3]; of many classes the first ones."""
    rows: dict[int, list[int]] = {}
    for number, label in enumerate(drawn.labels):
        if label in rows or len(rows) < SHEET_CLASSES:
            rows.setdefault(label, []).append(number)
    shown = {label: drawn.read(numbers[:SHEET_PER_CLASS]) for label, numbers in sorted(rows.items())}
    return labelled_sheet({drawn.classes[label] if label >= 0 else "": images for label, images in shown.items()})


def _draw_missing(
    drawn: DrawnSet,
    mine: Sequence[int],
    batch: int,
    draw: Callable[[Sequence[int]], NDArray[np.uint8]],
    report: Report,
) -> None:
    missing = drawn.missing(mine)
    there = sum(len(drawn.parts[part]) for part in set(mine) - set(missing))
    if there:
        report(there, None)
    began = time.perf_counter()
    for done in write_parts(drawn, missing, batch, draw):
        report(there + done, done / (time.perf_counter() - began))
