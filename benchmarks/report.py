"""Results on a terminal: tables of one result, and two results side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.result import Figure, Result, read_result
from vqscale.errors import UserError

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
    if result.load.above_cores:
        before, after = result.load.before[0], result.load.after[0]
        found.append(f"the load was above the {result.machine.cores} cores ({before:g} before, {after:g} after)")
    if result.load.others >= 0.1:
        found.append(f"other processes kept {result.load.others:g} cores busy")
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
    for line in remarks(result):
        console.print(f"note: {line}", markup=False, highlight=False)


def _figure_rows(result: Result) -> list[tuple[str, ...]]:
    return [(key, number(one.median), spread(one), one.unit) for key, one in result.figures.items()]


def _table(head: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column(head, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("unit", "goal") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_comparison(paths: Sequence[Path], force: bool) -> None:
    """Print the ratios of two results side by side.

    Raises:
        UserError: they are of different benchmarks or, unless forced, of different machines.
    """
    one, other = (read_result(path) for path in paths)
    if one.name != other.name:
        raise UserError(f"{one.name} and {other.name} are different benchmarks", where="--compare")
    differences = _differences(one, other)
    if one.machine.identity != other.machine.identity and not force:
        raise UserError(
            f"measured on different machines ({one.machine.name}, {other.machine.name})",
            where="--compare",
            mend="compare them all the same with --force",
        )
    rows = [(key, *_cells(one, key), *_cells(other, key), _change(one, other, key)) for key in _keys(one, other)]
    columns = (paths[0].name, "95 %", paths[1].name, "95 %", "change")
    console = _console()
    console.print(_table(f"ratio of {one.name}", columns, rows))
    for line in differences:
        console.print(f"note: {line}", markup=False, highlight=False)


def _keys(one: Result, other: Result) -> list[str]:
    return list(dict.fromkeys((*one.ratios, *other.ratios)))


def _cells(result: Result, key: str) -> tuple[str, str]:
    return (number(result.ratios[key]), interval(result, key)) if key in result.ratios else ("", "")


def _change(one: Result, other: Result, key: str) -> str:
    """Change in percent; marked where the intervals do not overlap."""
    if key not in one.ratios or key not in other.ratios:
        return ""
    (low, high), (lower, higher) = one.intervals[key], other.intervals[key]
    apart = " *" if high < lower or higher < low else "  "
    return f"{100 * (other.ratios[key] / one.ratios[key] - 1):+.1f} %{apart}"


def _differences(one: Result, other: Result) -> list[str]:
    """What besides the code differs between two results."""
    found = ["* the intervals do not overlap"]
    if one.machine.identity != other.machine.identity:
        found.append(f"the machines differ: {one.machine.name}, {other.machine.name}")
    for key in dict.fromkeys((*one.config, *other.config)):
        if one.config.get(key) != other.config.get(key):
            found.append(f"{key} differs: {one.config.get(key)}, {other.config.get(key)}")
    for package in dict.fromkeys((*one.versions, *other.versions)):
        if one.versions.get(package) != other.versions.get(package):
            found.append(f"{package} differs: {one.versions.get(package)}, {other.versions.get(package)}")
    return found
