"""Tables of runs for a terminal: the stages of one, or a line for each of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.status import RunStatus, StageStatus
from launcher.wording import below, beside, duration, eta, loss, progress, rate, saved

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table
    from rich.text import Text

_COLOURS = {
    "running": "bold cyan",
    "done": "green",
    "failed": "bold red",
    "cancelled": "yellow",
    "preempted": "yellow",
}
_RIGHT = ("step", "rate", "loss", "bad")
"""Columns whose figures stand below each other."""
_WIDE = 104
"""Columns of a terminal in which a run's table has room for bars and for the age of checkpoints."""


def view(status: RunStatus) -> Group:
    """A run for rich: the table of its stages, and below it what no column has room for."""
    from rich.console import Group
    from rich.text import Text

    # Plain text, broken by the terminal alone: a caption of the table would be broken where the table ends.
    return Group(_Stages(status), *(Text(line, overflow="fold") for line in below(status)))


@dataclass(frozen=True)
class _Stages:
    """The table of a run's stages, cut to the terminal: no figure is."""

    status: RunStatus

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield _table(self.status, wide=options.max_width >= _WIDE)


def _table(status: RunStatus, *, wide: bool) -> Table:
    from rich.markup import escape
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    title, gap = escape(f"{status.id}: {status.words}"), 2 if wide else 1
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, gap, 0, 0))
    names = ("stage", "state", "step", *([""] if wide else []), "loss", "rate", "time", "ETA", "saved at")
    for name in names:
        result.add_column(name, no_wrap=True, justify="right" if name in ("step", "loss", "rate", "time") else "left")
    for stage in status.stages:
        share = 1.0 if stage.state == "done" else (stage.step or 0) / stage.total if stage.total else 0.0
        # Colours by name: rich's own look alike, empty or full, on a terminal of sixteen colours.
        bar = [ProgressBar(1.0, share, width=20, complete_style="cyan", finished_style="green")] if wide else []
        result.add_row(
            stage.stage,
            _coloured(stage.state) + (f" #{stage.attempt}" if stage.attempt > 1 else ""),
            progress(stage, word=""),
            *bar,
            loss(stage, word=""),
            rate(stage),
            duration(stage.seconds) if stage.seconds is not None else "",
            eta(stage),
            saved(stage) if wide or not stage.saved else str(stage.saved.step),
        )
    return result


def view_many(statuses: Sequence[RunStatus]) -> Group:
    """Several runs for rich: a line for each with its stage worth looking at, and below it what has to be told."""
    from rich.console import Group
    from rich.text import Text

    told = [Text(line, overflow="fold") for status in statuses for line in beside(status)]
    return Group(_table_of_runs(statuses), *told)


def _table_of_runs(statuses: Sequence[RunStatus]) -> Text:
    """Columns by hand: rich takes a quarter of a second for a table of 200 lines, half of what `status` may take."""
    from rich.text import Text

    heads = ("run", "stage", "state", "step", "rate", "loss", "ETA", "saved at", "bad")
    rows = [heads, *((status.id, *_cells(status)) for status in statuses)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        cells = [f"{c:>{w}}" if h in _RIGHT else f"{c:{w}}" for h, c, w in zip(heads, row, widths, strict=True)]
        style = _COLOURS.get(row[2], "dim") if number else "bold"
        left, right = "  ".join(cells[:2]), "  ".join(cells[3:])
        lines.append(Text.assemble(f"{left}  ", (cells[2], style), f"  {right}", style="" if number else "bold"))
    return Text("\n", no_wrap=True, overflow="crop").join(lines)


def _cells(status: RunStatus) -> tuple[str, ...]:
    stage = status.stage
    return (_which(stage), status.state, *_figures(stage)) if stage else ("", status.state, *[""] * 6)


def _which(stage: StageStatus) -> str:
    return f"{stage.stage} #{stage.attempt}" if stage.attempt > 1 else stage.stage


def _figures(stage: StageStatus) -> tuple[str, ...]:
    bad = sum(stage.bad.values())
    return (progress(stage, ""), rate(stage), loss(stage, ""), eta(stage), saved(stage), str(bad) if bad else "")


def _coloured(state: str) -> str:
    return f"[{_COLOURS.get(state, 'dim')}]{state}[/]"


def console() -> Console:
    """Where tables are printed. A pipe has no width: lines that somebody greps are not cut."""
    from rich.console import Console

    made = Console()
    if not made.is_terminal:
        made.width = 200
    return made
