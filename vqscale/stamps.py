"""Times before the lines of a rank's log, by which the logs of all ranks are merged.

A rank stamps what it writes to standard output and error where these are files: torch's agent leads them there. What
native libraries write by themselves has no stamp, and is read as of the line before it.
"""

from __future__ import annotations

import io
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ?")


def stamp(now: float) -> str:
    """Unix time as it stands before a line, such as `2026-01-31T12:00:00.000Z`; it sorts as the times do."""
    whole = int(now)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((now - whole) * 1000):03d}Z"


def split(line: str) -> tuple[str, str]:
    """Stamp and text of a line; the stamp is empty where there is none."""
    found = _STAMP.match(line)
    return (found[1], line[found.end() :]) if found else ("", line)


class StampedStream(io.TextIOBase):
    """A text stream that stamps each line when its first character comes.

    Args:
        stream: where the lines go.
        clock: Unix time; tests put their own here.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.time) -> None:
        self._stream, self._clock = stream, clock
        self._begun = False
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Write text, whole lines or parts of them."""
        with self._lock:
            if text:
                head, end = f"{stamp(self._clock())} ", "\n" if text.endswith("\n") else ""
                lines = text.removesuffix("\n").replace("\n", f"\n{head}")
                self._stream.write(("" if self._begun else head) + lines + end)
                self._begun = not end
        return len(text)

    def flush(self) -> None:
        """Flush what lies below."""
        self._stream.flush()

    def fileno(self) -> int:
        """Of the file below: native libraries and child processes write there without stamps."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream below."""
        return self._stream.encoding


def stamp_output() -> None:
    """From now on stamp standard output and error of this process, where they are files; a terminal stays as it is."""
    if _is_file(sys.stdout):
        sys.stdout = StampedStream(sys.stdout)
    if _is_file(sys.stderr):
        sys.stderr = StampedStream(sys.stderr)


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # replaced by something in memory, or closed
        return False
