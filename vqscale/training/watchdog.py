"""A rank that hangs is noticed, all ranks leave their stacks in the run directory, and the stage ends.

Every rank has a thread that looks at the last sign of life of its own training loop. One rank that hangs makes the
others wait in a collective, so all of them fall silent; the first whose time is over leaves a note, upon which all
others dump as well. The stacks and what was being done tell who waited and who hung.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from vqscale.files import read_json, write_json

EXIT_HANG = 75
"""Exit code of a rank that hung, or waited for one that did (sysexits' temporary failure)."""

_LOOK_S = 0.5
_NOTES = 50
"""Times within the longest silence that a rank looks for notes: each costs the shared file system a lookup, and there
may be thousands of ranks."""
_PHASES = 16  # ranks look one after the other, not all at once
_START = 4  # times as long a silence is borne until the second step: kernels are compiled, workers started
_OTHERS_S = 3.0  # that other ranks are given at least to notice the note and dump


class Watchdog:
    """Signs of life of one rank.

    Args:
        folder: where notes and dumps go, the same on all ranks (`RunLayout.attempt`).
        rank: this rank.
        limit_s: longest silence; four times as long until the second step, since the first one starts everything up.
        end: called when the time is over and all ranks had time to dump; has to end the process, and not in an orderly
            way: the main thread hangs, and so would everything that waits for it.
    """

    def __init__(self, folder: Path, rank: int, limit_s: float, end: Callable[[], None]) -> None:
        self._folder, self._rank, self._limit = folder / "hang", rank, limit_s
        self._end = end
        self._notes_s = max(_LOOK_S, limit_s / _NOTES)
        self._last = (time.monotonic(), "start", 0)
        self._first: int | None = None
        self._patience = _START
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="vqscale-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.time()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def beat(self, doing: str, step: int) -> None:
        """A sign of life: what begins now, at which step. Costs next to nothing."""
        if self._patience > 1:
            self._first = step if self._first is None else self._first
            self._patience = 1 if step > self._first else _START
        self._last = (time.monotonic(), doing, step)

    def alive(self) -> None:
        """A sign of life in the midst of what was begun last."""
        self._last = (time.monotonic(), *self._last[1:])

    def _look(self) -> None:
        due = time.monotonic() + self._notes_s * (self._rank % _PHASES) / _PHASES
        while not self._over.wait(_LOOK_S):
            now = time.monotonic()
            silent, noted = now - self._last[0], False
            if now >= due:
                due, noted = now + self._notes_s, self._noted()
            if noted or silent > self._limit * self._patience:
                self._dump(silent)
                return

    def _noted(self) -> bool:
        """Whether another rank's time is over; notes of earlier starts do not count."""
        return any(note.stat().st_mtime > self._began for note in self._folder.glob("rank-*.json"))

    def _dump(self, silent: float) -> None:
        _, doing, step = self._last
        note = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "doing": doing,
            "step": step,
            "silent_s": round(silent, 1),
            "limit_s": self._limit,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        number = f"{self._rank:05d}"
        with (self._folder / f"stacks-{number}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        # What the collectives of this rank were, as torch recorded them (TORCH_FR_BUFFER_SIZE entries).
        (self._folder / f"flight-{number}.json").write_bytes(_flight_record())
        write_json(self._folder / f"rank-{number}.json", note)
        if not self._over.wait(max(_OTHERS_S, 2 * self._notes_s)):
            self._end()


def find_hang(folder: Path, world: int) -> tuple[list[int], str]:
    """Which ranks hang, as far as the notes in an attempt's folder tell, and in words what the others did meanwhile.

    A rank without a note cannot even run its watchdog: it is stopped, or holds the interpreter's lock in foreign code.
    Among those with one, who is in an earlier step, or outside of a collective, is waited for by the rest.
    """
    notes = [read_json(path) for path in sorted((folder / "hang").glob("rank-*.json"))]
    mute = sorted(set(range(world)) - {note["rank"] for note in notes})
    behind = min(notes, key=lambda note: (note["step"], note["doing"] == "collective", -note["silent_s"]))
    if mute:
        who = f"rank {', '.join(map(str, mute))} hangs and cannot leave a note"
    else:
        who = f"rank {behind['rank']} on {behind['host']} hangs"
    longest = max(note["silent_s"] for note in notes)
    what = f"step {behind['step']} ({behind['doing']}), no sign of life for {longest:.0f} s"
    return mute or [behind["rank"]], f"{who}, {what}; stacks in {folder / 'hang'}"


def _flight_record() -> bytes:
    from torch._C import _distributed_c10d

    try:
        return bytes(_distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError) as error:  # not every build of torch records
        return json.dumps({"error": str(error)}).encode()
