"""The progress display: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from launcher.status import RunStatus, StageStatus, read_status
from vqscale.config.layout import RunLayout

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_REFRESH_S = 0.5
_LINE_EVERY_S = 10.0
_COLOURS = {
    "running": "bold cyan",
    "done": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "preempted": "yellow",
}


def follow(layout: RunLayout, out: TextIO | None = None) -> RunStatus:
    """Show a run's progress until nobody runs it any more; returns its last status.

    Args:
        layout: the run.
        out: where to write; standard output when None.
    """
    stream = out or sys.stdout
    return _follow_live(layout) if stream.isatty() else _follow_plain(layout, stream)


def _follow_live(layout: RunLayout) -> RunStatus:
    from rich.console import Console
    from rich.live import Live

    status = read_status(layout)
    with Live(view(status), console=Console(), refresh_per_second=4) as live:
        while not status.over:
            time.sleep(_REFRESH_S)
            status = read_status(layout)
            live.update(view(status))
    return status


def _follow_plain(layout: RunLayout, out: TextIO) -> RunStatus:
    lines = PlainLines()
    while True:
        status = read_status(layout)
        for line in lines.new(status):
            print(line, file=out, flush=True)
        if status.over:
            return status
        time.sleep(_REFRESH_S)


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
            if stage.state != "waiting" and self._seen.get(stage.stage) != key:
                self._seen[stage.stage] = key
                self._last = self._clock()
                lines.append(stage_line(stage))
            elif stage.state == "running" and stage.step and self._clock() - self._last >= _LINE_EVERY_S:
                self._last = self._clock()
                lines.append(stage_line(stage))
        return lines


def stage_line(stage: StageStatus) -> str:
    """A stage in one line of text."""
    parts = [f"{stage.stage:<10} {stage.state:<9}"]
    if stage.attempt > 1:
        parts.append(f"attempt {stage.attempt}")
    if stage.state != "running" and stage.seconds is not None:
        parts.append(f"after {duration(stage.seconds)}")
    parts += [text for text in (progress(stage), loss(stage), rate(stage), bad_samples(stage)) if text]
    if stage.eta_s is not None:
        parts.append(f"ETA {duration(stage.eta_s)}")
    if stage.message:
        parts.append(stage.message)
    return "  ".join(parts)


def view(status: RunStatus) -> Group:
    """A run for rich: the table of its stages, and below it what no column has room for."""
    from rich.console import Group
    from rich.text import Text

    # Plain text, broken by the terminal alone: a caption of the table would be broken where the table ends.
    return Group(_table(status), *(Text(line, overflow="fold") for line in below(status)))


def _table(status: RunStatus) -> Table:
    from rich.markup import escape
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    result = Table(title=escape(f"{status.id}: {status.words}"), title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "state", "step", "", "loss", "rate", "time", "ETA"):
        result.add_column(name, no_wrap=True, justify="right" if name in ("step", "loss", "rate", "time") else "left")
    for stage in status.stages:
        share = 1.0 if stage.state == "done" else (stage.step or 0) / stage.total if stage.total else 0.0
        # Colours by name: rich's own look alike, empty or full, on a terminal of sixteen colours.
        bar = ProgressBar(1.0, share, width=20, complete_style="cyan", finished_style="green")
        style = _COLOURS.get(stage.state, "dim")
        result.add_row(
            stage.stage,
            f"[{style}]{stage.state}[/]" + (f" #{stage.attempt}" if stage.attempt > 1 else ""),
            progress(stage, word=""),
            bar,
            loss(stage, word=""),
            rate(stage),
            duration(stage.seconds) if stage.seconds is not None else "",
            duration(stage.eta_s) if stage.eta_s is not None else "",
        )
    return result


def below(status: RunStatus) -> list[str]:
    """What is said below the table: why the run failed, and the stages' bad samples."""
    counted = [f"{stage.stage}: {bad_samples(stage)}" for stage in status.stages if stage.bad]
    return [line for line in (status.message, *counted) if line]


def bad_samples(stage: StageStatus) -> str:
    """`3 bad samples (2 corrupt, 1 label)`, or nothing when there are none."""
    if not stage.bad:
        return ""
    total, kinds = sum(stage.bad.values()), ", ".join(f"{count} {kind}" for kind, count in stage.bad.items())
    return f"{total} bad sample{'s' if total > 1 else ''} ({kinds}), listed in stages/{stage.stage}/quarantine.jsonl"


def progress(stage: StageStatus, word: str = "step ") -> str:
    """`step 120/600`, as far as it is known."""
    if stage.step is None:
        return ""
    return f"{word}{stage.step}/{stage.total}" if stage.total else f"{word}{stage.step}"


def loss(stage: StageStatus, word: str = "loss ") -> str:
    """`loss 0.0123`, when there is one."""
    return f"{word}{stage.loss:.4g}" if isinstance(stage.loss, (int, float)) else ""


def rate(stage: StageStatus) -> str:
    """`812 images/s`, when it is known."""
    return f"{stage.rate:,.0f} {stage.unit}".rstrip() if stage.rate else ""


def duration(seconds: float) -> str:
    """`42 s`, `3:05` (minutes) or `2:03:05` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
