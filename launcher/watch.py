"""The progress display: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from launcher.status import RunStatus, read_status
from launcher.tables import view, view_many
from launcher.wording import stage_line
from vqscale.config.layout import RunLayout

if TYPE_CHECKING:
    from rich.console import Group

Read = Callable[[], Sequence[RunStatus]]
"""Reads the runs that are shown, anew each time."""

EXIT_FAILED = 1
"""Exit code when a run that was followed is not done."""

_REFRESH_S = 0.5
_REFRESH_MANY_S = 2.0
_LINE_EVERY_S = 10.0


def follow(layout: RunLayout, out: TextIO | None = None) -> RunStatus:
    """Show a run's progress until nobody runs it any more; returns its last status.

    Args:
        layout: the run.
        out: where to write; standard output when None.
    """
    stream = out or sys.stdout

    def read() -> list[RunStatus]:
        return [read_status(layout)]

    if stream.isatty():
        return _follow_live(read, _REFRESH_S, lambda statuses: view(statuses[0]))[0]
    return _follow_plain(read, _REFRESH_S, stream)[0]


def follow_many(read: Read) -> Sequence[RunStatus]:
    """Show several runs until nobody runs any of them; returns how they stand then."""
    if sys.stdout.isatty():
        return _follow_live(read, _REFRESH_MANY_S, view_many)
    return _follow_plain(read, _REFRESH_MANY_S, sys.stdout, named=True)


def _follow_live(read: Read, refresh_s: float, shown: Callable[[Sequence[RunStatus]], Group]) -> Sequence[RunStatus]:
    from rich.console import Console
    from rich.live import Live

    statuses = read()
    if not statuses:
        return statuses
    with Live(shown(statuses), console=Console(), refresh_per_second=4) as live:
        while not _over(statuses):
            time.sleep(refresh_s)
            statuses = read()
            live.update(shown(statuses))
    return statuses


def _follow_plain(read: Read, refresh_s: float, out: TextIO, named: bool = False) -> Sequence[RunStatus]:
    lines: dict[str, PlainLines] = {}
    while True:
        statuses = read()
        for status in statuses:
            for line in lines.setdefault(status.id, PlainLines()).new(status):
                print(f"{status.id}  {line}" if named else line, file=out, flush=True)
        if _over(statuses):
            return statuses
        time.sleep(refresh_s)


def _over(statuses: Sequence[RunStatus]) -> bool:
    """Whether nothing more will happen; between two runs of a sweep the next one is about to begin."""
    return all(status.over and not status.queued for status in statuses)


class PlainLines:
    """Chooses what is worth a line: every change of a stage, and progress every ten seconds.

    Args:
        clock: seconds; tests put their own here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[str, int]] = {}
        self._last = clock()

    def new(self, status: RunStatus) -> list[str]:
        """Lines for what has changed since the last call."""
        lines = []
        for stage in status.stages:
            key = (stage.state, stage.attempt)
            if (stage.state != "waiting" or stage.message) and self._seen.get(stage.stage) != key:
                self._seen[stage.stage] = key
                self._last = self._clock()
                lines.append(stage_line(stage))
            elif stage.state == "running" and stage.step and self._clock() - self._last >= _LINE_EVERY_S:
                self._last = self._clock()
                lines.append(stage_line(stage))
        return lines
