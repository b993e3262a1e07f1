"""Waiting in tests for what other processes do: by looking, up to a limit that a hang reaches and no slow machine."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.ranks import LIMIT_S
from vqscale.config.layout import RunLayout


def until(condition: Callable[[], object], layout: RunLayout | None = None, seconds: float = LIMIT_S) -> None:
    """Return once the condition holds.

    Args:
        condition: looked at again and again; what it raises is raised.
        layout: the run that is waited for; its logs are shown when the time is over.
        seconds: until then.
    """
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited too long\n{told(layout) if layout else ''}"
        time.sleep(0.02)


def told(layout: RunLayout) -> str:
    """All that a failed test has to show of a run."""
    files = [layout.log, layout.state, *sorted(layout.root.rglob("agent.log")), *sorted(layout.root.rglob("std*.log"))]
    return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in files if path.exists())
