"""Drawn images on disk, written in parts: what was stopped goes on with the parts that are not there.

A part is a range of numbers. When its images are in place it is recorded in `parts/`; when all are, `samples.json` is
written, and `parts/` goes. Both name what the images follow from, so nothing of another drawing is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vqscale.data.drawn_formats import FORMATS, Format, Pixels, Place, clear_parts, parts_folder
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

RECORD = "samples.json"

_PARTS, _LEAST, _MOST = 256, 8, 1_024


@dataclass(frozen=True)
class DrawnSet:
    """The images that a folder is to hold."""

    folder: Path
    output: str
    """`png`, `webdataset` or `npz`."""
    size: int
    """Side of the images in pixels."""
    classes: tuple[str, ...]
    """Names of all classes; empty when there are none."""
    labels: tuple[int, ...]
    """Class of each image; -1 for none."""
    drawn_from: Mapping[str, Any]
    """Plain values that say what the images follow from, such as the models' fingerprints and the seed."""

    @cached_property
    def parts(self) -> tuple[range, ...]:
        """Numbers of each part; they depend on the number of images alone."""
        count = len(self.labels)
        length = min(_MOST, max(_LEAST, -(-count // _PARTS)))
        return tuple(range(start, min(count, start + length)) for start in range(0, count, length))

    @cached_property
    def identity(self) -> str:
        """Hash of all that the images and their files follow from."""
        facts = [self.output, self.size, self.classes, self.labels, dict(self.drawn_from)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    @cached_property
    def _format(self) -> Format:
        return FORMATS[self.output](Place(self.folder, self.size, self.classes, self.labels, self.parts))

    def is_finished(self) -> bool:
        """Whether all of it is in the folder."""
        record = read_json(self.folder / RECORD)
        files = record["files"] if record and record.get("identity") == self.identity else []
        return bool(files) and all((self.folder / name).is_file() for name in files)

    def require_own(self, *, replace: bool) -> list[Any]:
        """Whether the folder may be used; returns what is recorded of other drawings in it.

        Args:
            replace: whether these may be replaced.

        Raises:
            UserError: there are some, and they may not.
        """
        earlier = [read_json(path) for path in (self.folder / RECORD, self._plan)]
        others = [record for record in earlier if record and record.get("identity") != self.identity]
        if others and not replace:
            mend = "name another folder, or replace them with --force"
            raise UserError("holds images of another drawing", where=str(self.folder), mend=mend)
        return others

    def prepare(self, *, replace: bool) -> None:
        """Make the folder ready; what another drawing has left there is removed. As `require_own`."""
        others = self.require_own(replace=replace)
        for record in others:
            for name in record.get("files", ()):
                (self.folder / name).unlink(missing_ok=True)
        if others:
            (self.folder / RECORD).unlink(missing_ok=True)
            clear_parts(self.folder)
        write_json(self._plan, {"identity": self.identity})

    def missing(self, numbers: Sequence[int] | None = None) -> list[int]:
        """Those of some parts (by default all) that have to be written."""
        wanted = range(len(self.parts)) if numbers is None else numbers
        return [number for number in wanted if self._facts(number) is None]

    def write(self, number: int, images: Pixels) -> None:
        """Write a part and record it."""
        write_json(self._part(number), {"identity": self.identity, "facts": self._format.write(number, images)})

    def finish(self) -> None:
        """Make the whole of the parts and record it; the parts' records go.

        Raises:
            UserError: a part is missing.
        """
        found = [self._facts(number) for number in range(len(self.parts))]
        facts = [one for one in found if one is not None]
        if len(facts) < len(found):
            raise UserError(
                f"{len(found) - len(facts)} of {len(found)} parts are missing",
                where=str(self.folder),
                mend="draw again",
            )
        record = {
            "identity": self.identity,
            "output": self.output,
            "image_size": self.size,
            "classes": self.classes,
            "labels": self.labels,
            "files": self._format.finish(facts),
            "drawn_from": self.drawn_from,
        }
        write_json(self.folder / RECORD, record)
        clear_parts(self.folder)

    def read(self, numbers: Sequence[int]) -> Pixels:
        """Images uint8 [n, S, S, 3] by number; only when all is finished."""
        return self._format.read(np.asarray(numbers, np.int64))

    @property
    def _plan(self) -> Path:
        return parts_folder(self.folder) / "plan.json"

    def _part(self, number: int) -> Path:
        return parts_folder(self.folder) / f"{number:05d}.json"

    def _facts(self, number: int) -> Mapping[str, Any] | None:
        """What is recorded of a part; None when it has to be written."""
        record = read_json(self._part(number))
        if not record or record["identity"] != self.identity or not self._format.whole(number, record["facts"]):
            return None
        facts: Mapping[str, Any] = record["facts"]
        return facts


def open_drawn(folder: Path) -> DrawnSet:
    """The images that a finished drawing has left in a folder.

    Raises:
        UserError: there are none.
    """
    record = read_json(folder / RECORD)
    if record is None or "identity" not in record:
        what = f"has no {RECORD}" if record is None else f"has a {RECORD} of another version"
        raise UserError(what, where=str(folder), mend="run the stage 'sample' first")
    classes, labels = tuple(record["classes"]), tuple(record["labels"])
    return DrawnSet(folder, record["output"], record["image_size"], classes, labels, record["drawn_from"])


def write_parts(
    drawn: DrawnSet, parts: Sequence[int], batch: int, draw: Callable[[Sequence[int]], Pixels]
) -> Iterator[int]:
    """Draw and write parts; gives after each batch how many images are drawn.

    Args:
        drawn: what to write.
        parts: which parts.
        batch: images that are drawn at once, of one part or of several.
        draw: from numbers to images uint8 [n, S, S, 3].
    """
    waiting = deque(parts)
    numbers = [image for part in parts for image in drawn.parts[part]]
    held = np.empty((0, drawn.size, drawn.size, 3), np.uint8)
    for start in range(0, len(numbers), batch):
        chunk = numbers[start : start + batch]
        held = np.concatenate([held, draw(chunk)])
        while waiting and len(held) >= (length := len(drawn.parts[waiting[0]])):
            drawn.write(waiting.popleft(), held[:length])
            held = held[length:]
        yield start + len(chunk)
