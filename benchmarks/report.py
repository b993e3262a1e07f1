"""Results on a terminal: tables of one result, and two results side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.compare import Change, differences
from benchmarks.result import Curve, Figure, Prediction, Result

_WIDTH = 100


def number(value: float) -> str:
    """Three significant digits or more, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def spread(figure: Figure) -> str:
    """Tenth to ninetieth percentile."""
    return f"{number(figure.p10)} – {number(figure.p90)}"


def interval(result: Result, key: str) -> str:
    """The interval of a ratio."""
    low, high = result.intervals[key]
    return f"{number(low)} – {number(high)}"


def goal(result: Result, key: str) -> str:
    """The goal of a ratio and, but for quick runs, whether it was met; empty where there is none."""
    stated = result.goals.get(key)
    if stated is None:
        return ""
    if result.config.get("quick"):
        return f"{stated.bound} {stated.limit:g}"
    verdict = "met" if stated.met(result.ratios[key]) else "missed"
    return f"{stated.bound} {stated.limit:g}: {verdict}"


def remarks(result: Result) -> list[str]:
    """What a reader has to know before believing the figures."""
    found = [f"skipped {name}: {why}" for name, why in result.skipped.items()]
    if result.config.get("quick"):
        found.append("a quick run shows that it works; its figures say nothing")
    if result.load.others >= 0.1:  # not by load averages: a benchmark with several processes raises them itself
        before, after = result.load.before[0], result.load.after[0]
        found.append(
            f"other processes kept {result.load.others:g} cores busy (load {before:g} before, {after:g} after)"
        )
    return found


def _console() -> Console:
    """Wide enough for the tables: a terminal wraps long lines, but Rich would cut units off."""
    found = Console()
    return found if found.width >= _WIDTH else Console(width=_WIDTH)


def print_result(result: Result) -> None:
    """Print figures, ratios with goals, floors, and remarks."""
    console = _console()
    console.print(_table("figure", ("median", "p10 – p90", "unit"), _figure_rows(result)))
    if result.ratios:
        rows = [(key, number(value), interval(result, key), goal(result, key)) for key, value in result.ratios.items()]
        console.print(_table("ratio", ("median", "95 % interval", "goal"), rows))
    if result.floors:
        rows = [(key, number(floor.median), spread(floor), floor.unit) for key, floor in result.floors.items()]
        console.print(_table("floor", ("median", "p10 – p90", "unit"), rows))
    if result.prediction:
        print_prediction(result.prediction)
    for line in remarks(result):
        console.print(f"note: {line}", markup=False, highlight=False)


def _figure_rows(result: Result) -> list[tuple[str, ...]]:
    return [(key, number(one.median), spread(one), one.unit) for key, one in result.figures.items()]


def _table(head: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column(head, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("unit", "goal", "verdict") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_prediction(prediction: Prediction) -> None:
    """Print what a model says, how far off it is where it was measured, and what it assumes."""
    console = _console()
    curves = prediction.curves
    numbers = sorted({x for curve in curves.values() for x, _ in curve.points})
    rows = [(key, *(_at(curve, x) for x in numbers)) for key, curve in curves.items()]
    console.print(_table("prediction", tuple(f"{x:,.0f}" for x in numbers), rows))
    rows = [
        (key, number(one.predicted), number(one.measured), f"{100 * one.off:+.0f} %", one.unit)
        for key, one in prediction.compared.items()
    ]
    if rows:
        console.print(_table("the model here", ("predicted", "measured", "off", "unit"), rows))
    for line in prediction.assumptions:
        console.print(f"assumed: {line}", markup=False, highlight=False)


def _at(curve: Curve, x: float) -> str:
    """A curve's value at a place, empty where it has none."""
    return next((f"{y:.4f}" for place, y in curve.points if place == x), "")


def print_comparison(one: Result, other: Result, changed: Sequence[Change], tolerance: float) -> None:
    """Print the ratios of two results side by side, and what became of the laps of our contenders."""
    by_key = {change.what: change for change in changed if not change.laps}
    rows = [
        (
            key,
            *_cells(one, key),
            *_cells(other, key),
            *_change(by_key[key], tolerance, other.ratios[key] / one.ratios[key]),
        )
        for key in one.ratios
        if key in by_key
    ]
    console = _console()
    console.print(_table(f"ratio of {one.name}", ("first", "95 %", "second", "95 %", "change", "verdict"), rows))
    laps = [(change.what, *_change(change, tolerance, change.better_by)) for change in changed if change.laps]
    if laps:
        console.print(_table("our laps beside the others'", ("change", "verdict"), laps))
    for line in differences(one, other):
        console.print(f"note: {line}", markup=False, highlight=False)


def _cells(result: Result, key: str) -> tuple[str, str]:
    return number(result.ratios[key]), interval(result, key)


def _change(change: Change, tolerance: float, factor: float) -> tuple[str, str]:
    """Percent, and the verdict."""
    return f"{100 * (factor - 1):+.1f} %{' *' if change.sure else '  '}", change.verdict(tolerance)
