"""The events of a stage: one JSON object a line, appended by rank 0, read by `status` and the progress display."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends progress to `stages/STAGE/events.jsonl`; a line is written whole or not at all.

    Args:
        path: the events file (`RunLayout.events`).
        stage: name of the stage.
        attempt: number of the attempt, from 1.
        unit: what `rate` counts, such as `images/s`.
        total: steps of the whole stage, for the estimate of the time left.
    """

    def __init__(self, path: Path, stage: str, attempt: int, unit: str, total: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self.unit = unit
        self._head = {"stage": stage, "attempt": attempt, "unit": unit, "total": total}
        self._total = total
        self._first: tuple[float, int] | None = None

    def log(self, step: int, *, rate: float | None = None, **figures: Any) -> None:
        """Record that `step` steps are done.

        Args:
            step: finished steps, counted from the stage's beginning.
            rate: units a second since the last line.
            figures: whatever else is known, such as `loss` or `data_wait` (share of the time, 0 to 1).
        """
        now = time.time()
        if self._first is None:
            self._first = (now, step)
        began, first = self._first
        done = step - first
        eta = (now - began) / done * (self._total - step) if done > 0 else None
        line = {"time": now, **self._head, "step": step, "rate": rate, "eta_s": eta, **figures}
        self._write(line)

    def note(self, kind: str, step: int, **facts: Any) -> None:
        """Record what happened beside the progress, such as a `checkpoint`.

        Args:
            kind: what happened.
            step: finished steps that it belongs to.
            facts: plain values.
        """
        head = {"stage": self._head["stage"], "attempt": self._head["attempt"]}
        self._write({"time": time.time(), **head, "event": kind, "step": step, **facts})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_TAILS = (1 << 16, 1 << 20)
"""Bytes of a file's end that are looked at, the second only where the first does not hold all that is asked for."""


def newest(path: Path, *kinds: str) -> dict[str, dict[str, Any]]:
    """The newest whole line of each kind in an events file, by kind; what is not near the file's end is left out.

    Args:
        path: the events file; nothing is found where there is none.
        kinds: of `note`, such as `checkpoint` (those that were committed); an empty one stands for progress.
    """
    found: dict[str, dict[str, Any]] = {}
    for length in _TAILS:
        tail, whole = _tail(path, length)
        found = _newest(tail, kinds)
        if whole or len(found) == len(kinds):
            break
    return found


def _newest(tail: bytes, kinds: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    found = {kind: _newest_of(tail, kind) for kind in kinds}
    return {kind: event for kind, event in found.items() if event is not None}


def _newest_of(tail: bytes, kind: str) -> dict[str, Any] | None:
    """Most lines are passed over, so they are neither parsed nor even cut out."""
    key = b'"event": "'  # inside of a value the quotes would be escaped
    sought = key + kind.encode() + b'"' if kind else b"\n"
    stop = tail.rfind(b"\n")  # what stands behind the last newline is not finished
    while (at := tail.rfind(sought, 0, stop)) >= 0:
        start = tail.rfind(b"\n", 0, at + 1) + 1
        end = tail.find(b"\n", start)
        line, stop = tail[start:end], start - 1
        # A kill may have torn a line, and put the next one behind it.
        whole = line.startswith(b"{") and line.endswith(b"}")
        if whole and b'"committed": false' not in line and (kind or key not in line):
            with contextlib.suppress(ValueError):
                event: dict[str, Any] = json.loads(line)
                return event
    return None


def _tail(path: Path, length: int) -> tuple[bytes, bool]:
    """A newline and whole lines at a file's end, and whether they are all of it."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, 2) - length)
            file.seek(start)
            data = file.read()
    except FileNotFoundError:
        return b"\n", True
    if start == 0:
        return b"\n" + data, True
    _, newline, lines = data.partition(b"\n")  # the first may be the end of a line
    return newline + lines, False
