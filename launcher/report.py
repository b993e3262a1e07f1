"""Prints what a finished run has measured, and where to look next."""

from __future__ import annotations

import shlex
from typing import Any

from launcher.state import RunState
from launcher.status import read_status
from launcher.wording import what_next
from vqscale.config.layout import RunLayout
from vqscale.files import read_json


def print_report(layout: RunLayout) -> None:
    """Print `report.json` as a table, the sample sheet's path, and the TensorBoard command."""
    from rich.console import Console

    report = read_json(layout.report)
    if isinstance(report, dict):
        console = Console()
        times = [*seconds(report), *elapsed(RunState.read(layout))]
        for title, rows in (("report", figures(report)), ("seconds", times)):
            if rows:
                console.print(_table(title, rows))
    sheet = layout.samples / "sheet.png"
    print()
    if sheet.exists():
        print(f"samples      {sheet}")
    if layout.report_page.exists():
        print(f"page         {layout.report_page}")
    print(f"directory    {layout.root}")
    print(f"tensorboard  tensorboard --logdir {shlex.quote(str(layout.tensorboard))}")
    print(f"next         {what_next(read_status(layout))}")


def figures(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Single values of a report, as name and text."""
    return [
        (name, _text(value)) for name, value in report.items() if name != "run" and not isinstance(value, (dict, list))
    ]


def seconds(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Seconds by stage, and their sum."""
    by_stage = report.get("seconds")
    if not isinstance(by_stage, dict) or not by_stage:
        return []
    rows = [(stage, f"{value:.1f}") for stage, value in by_stage.items()]
    return [*rows, ("all", f"{sum(by_stage.values()):.1f}")]


def elapsed(state: RunState) -> list[tuple[str, str]]:
    """Seconds on the clock from the first start to the last end, the start of processes and pauses included."""
    started = [stage.started for stage in state.stages.values() if stage.started]
    ended = [stage.ended for stage in state.stages.values() if stage.ended]
    return [("on the clock", f"{max(ended) - min(started):.1f}")] if started and ended else []


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(title: str, rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, text in rows:
        table.add_row(name, text)
    return table
