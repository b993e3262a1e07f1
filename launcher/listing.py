"""Which runs a list shows: all that the index knows, or those that filters leave."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from launcher.registry import Entry, entries
from launcher.state_words import GONE, STATES
from launcher.status import Depth, RunStatus, read_many, unreadable
from vqscale.arguments import did_you_mean
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError

_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True)
class Row:
    """A run of the index, and how it stands as far as can be told."""

    entry: Entry
    status: RunStatus | None
    """None where it is gone."""
    state: str
    """One of `STATES`."""
    note: str

    def facts(self) -> dict[str, Any]:
        """Plain values for `ls --json`."""
        head = {"id": self.entry.id, "path": str(self.entry.path), "created": self.entry.created}
        profile = (self.status.profile if self.status else "") or None
        return {**head, "profile": profile, "state": self.state, "note": self.note}


@dataclass(frozen=True)
class Choice:
    """What of all runs is wanted."""

    states: Collection[str] = STATES
    name: str = "*"
    """Of the id, with `*` and `?`."""
    since: float = 0.0
    """Unix time from which on they were made."""
    profile: str | None = None
    newest: int | None = None
    """How many of those that are left; None for all."""

    def rows(self, depth: Depth) -> list[Row]:
        """The runs that are wanted, the oldest first; `depth` as for `read_status`."""
        found = [e for e in entries() if e.created >= self.since and fnmatch.fnmatchcase(e.id, self.name)]
        if self.newest is not None and self.profile is None and set(self.states) == set(STATES):
            found = found[-self.newest :]  # nothing is left to be read for the choice
        rows = [row for row in _read(found, depth) if row.state in self.states and self._fits(row)]
        return rows if self.newest is None else rows[-self.newest :]

    def _fits(self, row: Row) -> bool:
        return self.profile is None or (row.status is not None and row.status.profile == self.profile)


def choose(states: str | None, name: str | None, since: str | None, profile: str | None, newest: int | None) -> Choice:
    """A choice by the words of a command line; None is no filter.

    Raises:
        UserError: a word that means nothing.
    """
    if newest is not None and newest < 1:
        raise UserError(f"shows {newest} runs", where="-n", mend="choose 1 or more")
    start = 0.0 if since is None else _start(since)
    return Choice(_states(states) if states else STATES, name or "*", start, profile, newest)


def _states(text: str) -> list[str]:
    asked = [word.strip() for word in text.split(",")]
    for word in asked:
        if word not in STATES:
            mend = f"{did_you_mean(word, STATES)}states: {', '.join(STATES)}"
            raise UserError(f"no state '{word}'", where="--state", mend=mend)
    return asked


def _start(text: str) -> float:
    """Unix time that lies `2d` back, or at which a day begins here."""
    ago = re.fullmatch(r"(\d+)([mhdw])", text)
    if ago:
        return time.time() - int(ago[1]) * _UNITS[ago[2]]
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%d"))
    except ValueError:
        mend = "write 30m, 12h, 2d, 1w, or a day as 2026-01-31"
        raise UserError(f"'{text}' is no time", where="--since", mend=mend) from None


def _read(found: list[Entry], depth: Depth) -> list[Row]:
    there = [entry for entry in found if entry.exists]
    statuses = read_many((RunLayout(entry.path) for entry in there), depth)
    read = dict(zip((entry.id for entry in there), statuses, strict=True))
    return [_row(entry, read.get(entry.id)) for entry in found]


def _row(entry: Entry, status: RunStatus | UserError | None) -> Row:
    if status is None:
        return Row(entry, None, GONE, "its directory is not there")
    if isinstance(status, UserError):
        return _row(entry, unreadable(entry.id, entry.path, entry.created, status))
    return Row(entry, status, status.state, status.note)
