"""Sweeps: several runs below one folder: one recipe at all combinations of some settings, or the members of a family.

SWEEP/
  sweep.json        what is swept, and the runs in their order
  family.json       the members of a family (`launcher.family`)
  SWEEP.0/          run directories, as any other
  SWEEP.1/

`launcher.sweeper` starts them.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher import process, registry
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

MOST = 1000
"""Most runs of a sweep."""
_RECORD = "sweep.json"
_NAMED = 12  # runs of a sweep that a message names


@dataclass
class Sweep:
    """The record of a sweep."""

    id: str
    axes: dict[str, list[str]]
    """Dotted key → its values."""
    runs: list[str]
    """Ids of the runs, in the order in which they start; each is the name of its folder too."""
    at_most: int
    """Runs at the same time."""
    after: dict[str, str] = field(default_factory=dict)
    """Run → an earlier one whose output it reads, so that it starts when that one is over."""
    cancelled: bool = False
    runner: dict[str, Any] = field(default_factory=dict)
    """The process that starts the runs; empty where a queue does."""

    @classmethod
    def read(cls, folder: Path) -> Sweep | None:
        """The record in a folder; None when there is none.

        Raises:
            UserError: it is not one of ours.
        """
        tree = read_json(folder / _RECORD) if folder.is_dir() else None
        try:
            return None if tree is None else cls(**tree)
        except TypeError:
            raise UserError("holds no record of a sweep", where=str(folder / _RECORD)) from None

    def earlier(self, layouts: Sequence[RunLayout], number: int) -> list[RunLayout]:
        """Those of some of its runs that have to be over before one of them may start in a queue."""
        chained = layouts[number - self.at_most : number - self.at_most + 1] if number >= self.at_most else []
        needed = self.after.get(layouts[number].root.name)
        return [*chained, *(one for one in layouts if one.root.name == needed and one not in chained)]

    def layouts(self, folder: Path) -> list[RunLayout]:
        """The runs' directories."""
        return [RunLayout(folder / run) for run in self.runs]

    def enter(self, folder: Path) -> None:
        """Put it into the index, which may give it another id, and down."""
        self.id = registry.claim(folder.name, folder, time.time(), "sweep")
        self.write(folder)

    def write(self, folder: Path) -> None:
        """Put it down."""
        write_json(folder / _RECORD, asdict(self))


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Key and values of `key=a,b,c`; commas in brackets and quotes belong to a value.

    Raises:
        UserError: no key, no value, or one value twice.
    """
    key, separator, rest = text.partition("=")
    values = _split(rest)
    if not separator or not key or not all(values):
        raise UserError(f"{text!r} is no axis", where="--sweep", mend="write dotted.key=a,b,c")
    if len(set(values)) < len(values):
        raise UserError(f"{text!r} has a value twice", where="--sweep", mend="name each once")
    return key, values


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        quote = ("" if quote == letter else quote or letter) if letter in "'\"" else quote
        depth += 0 if quote else (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def points(axes: Iterable[tuple[str, list[str]]]) -> list[tuple[str, ...]]:
    """The overrides of each run: the product of all axes, the last one fastest.

    Raises:
        UserError: a key stands twice, or there are too many runs.
    """
    axes = list(axes)
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise UserError("a key is swept twice", where="--sweep", mend="give all its values at once")
    found = list(itertools.product(*([f"{key}={value}" for value in values] for key, values in axes)))
    if len(found) > MOST:
        raise UserError(f"{len(found):,} runs", where="--sweep", mend=f"sweep at most {MOST:,}")
    return found


def find(text: str) -> tuple[Path, Sweep] | None:
    """A sweep by its folder or id; None when a run lies there, or there is none of this name."""
    folder = Path(text).expanduser().resolve()
    if RunLayout(folder).info.exists():
        return None
    sweep = Sweep.read(folder)
    if sweep is None and text and os.sep not in text:  # an id is no path
        entry = registry.find(text)
        if entry and entry.kind == "sweep":
            folder, sweep = entry.path, Sweep.read(entry.path)
    return (folder, sweep) if sweep else None


def resolve_one(text: str) -> RunLayout:
    """A run as `registry.resolve` finds it, for commands that take no sweep.

    Raises:
        UserError: as there; a sweep is meant, whose runs the line names.
    """
    found = find(text)
    if found is None:
        return registry.resolve(text)
    runs = found[1].runs
    more = f", and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
    what = f"is a sweep of {len(runs)} runs, and one run is asked for"
    raise UserError(what, where=text, mend=f"name one of them: {', '.join(runs[:_NAMED])}{more}")


def turn(layout: RunLayout) -> str:
    """What a run that has not begun waits for, if it is one of a sweep that is still on its way; else empty."""
    sweep = Sweep.read(layout.root.parent)
    if sweep is None or layout.root.name not in sweep.runs:
        return ""
    on_its_way = sweep.runner and not sweep.cancelled and process.is_alive(sweep.runner)
    return f"waits for its turn in sweep {sweep.id}" if on_its_way else ""
