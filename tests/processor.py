"""Seconds of the processor that commands take: what the clock says depends on who else is at work on a machine."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_IMPORTS = (sys.executable, "-c", "import pydantic, yaml, rich.console")


def seconds(command: Sequence[str]) -> float:
    """Of one call; it has to succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_imports(commands: Sequence[Sequence[str]]) -> float:
    """What the quickest of several calls takes, as a multiple of loading the libraries that all commands need.

    That takes 0.13 s on a machine with nothing else to do, and up to twice as long where cores share their caches with
    others: so 6.5 is about a second.
    """
    pairs = [(seconds(_IMPORTS), seconds(command)) for command in commands]
    return min(second for _, second in pairs) / min(first for first, _ in pairs)
