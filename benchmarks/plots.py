"""Figures of results: one picture a result, made from nothing but its JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.result import Curve, Prediction, Result
from vqscale.errors import UserError
from vqscale.files import write_bytes

SOURCE = "Source"
"""Key of the PNG's text that holds the fingerprint of the result it was drawn from."""

_OURS, _GOAL, _MISSED, _INK, _FAINT = "#1f5fa8", "#2e7d32", "#c0392b", "#222222", "#bbbbbb"
_COLOURS = (_OURS, "#d98200", "#777777", "#7b3fa0")


def available() -> str | None:
    """Why nothing can be drawn, or None."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "matplotlib is not installed: pip install -c constraints.txt -e '.[bench]'"
    return None


def require() -> None:
    """Raise where nothing can be drawn.

    Raises:
        UserError: matplotlib is missing.
    """
    if why := available():
        missing, _, mend = why.partition(": ")
        raise UserError(missing, where="plots", mend=mend)


def fingerprint(result: Result) -> str:
    """A hash of a result, by which a picture can be told from an old one."""
    return hashlib.sha256(result.model_dump_json().encode()).hexdigest()


def draw(result: Result, path: Path) -> None:
    """Write a PNG of the result's ratios with intervals and goals and, where it has one, of its prediction.

    Raises:
        UserError: matplotlib is missing.
    """
    require()
    import io

    with _plain() as pyplot:
        curves = 1 if result.prediction else 0
        heights = [0.6 + 0.34 * len(result.ratios), *([2.6] * curves)]
        figure, axes = pyplot.subplots(
            len(heights),
            1,
            figsize=(7.2, sum(heights) + 0.5),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        _ratios(axes[0, 0], result)
        if result.prediction:
            _prediction(axes[1, 0], result.prediction)
        figure.suptitle(_title(result), fontsize=9, color=_INK)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, metadata={SOURCE: fingerprint(result), "Software": None})
        pyplot.close(figure)
    write_bytes(path, file.getvalue())


@contextmanager
def _plain() -> Iterator[Any]:
    """Pyplot without a display, with a quiet style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _FAINT}
    with matplotlib.rc_context(style):
        yield pyplot


def _title(result: Result) -> str:
    quick = ": a quick run, whose figures say nothing" if result.config.get("quick") else ""
    return f"{result.name}{quick}\n{result.machine.cpu}, {result.machine.cores} cores, {result.started[:10]}"


def _ratios(axes: Any, result: Result) -> None:
    """A line a ratio: its median, its interval, and its goal as a mark that points to where it is met."""
    verdicts = not result.config.get("quick")
    for row, (key, value) in enumerate(result.ratios.items()):
        low, high = result.intervals[key]
        goal = result.goals.get(key)
        missed = verdicts and goal is not None and not goal.met(value)
        colour = _MISSED if missed else _OURS
        axes.plot([low, high], [row, row], color=colour, linewidth=2.5, alpha=0.45, solid_capstyle="butt")
        axes.plot(value, row, "o", color=colour, markersize=5)
        axes.annotate(f"{value:.3g}", (value, row), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        if goal:
            mark = 9 if goal.bound == "at least" else 8  # carets to the right and to the left, from their base
            axes.plot([goal.limit] * 2, [row - 0.32, row + 0.32], color=_GOAL, linewidth=1.2)
            axes.plot(goal.limit, row, marker=mark, color=_GOAL, markersize=6, linestyle="none")
    axes.axvline(1, color=_FAINT, linewidth=0.8, zorder=0)
    if all(low > 0 for low, _ in result.intervals.values()):
        axes.set_xscale("log")
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(result.ratios)), list(result.ratios))
    axes.set_ylim(len(result.ratios) - 0.4, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ratio, with its 95 % interval; green: the goal, and the side on which it is met; red: missed")


def _prediction(axes: Any, prediction: Prediction) -> None:
    """The curves that share the first one's vertical axis."""
    first = next(iter(prediction.curves.values()))
    shown = [curve for curve in prediction.curves.values() if curve.y == first.y]
    for colour, curve in zip(_COLOURS, shown, strict=False):
        _curve(axes, curve, colour)
    axes.set_xscale("log", base=2)
    ticks = [x for x, _ in first.points]
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#eeeeee")
    axes.set_xlabel(f"{first.x}; predicted by a model, not measured")
    axes.set_ylabel(first.y.replace(", ", ",\n", 1), fontsize=7)
    axes.set_ylim(top=1.02)
    axes.legend(frameon=False, fontsize=7, loc="lower left")


def _curve(axes: Any, curve: Curve, colour: str) -> None:
    xs, ys = zip(*curve.points, strict=True)
    axes.plot(xs, ys, "o-", color=colour, markersize=3.5, linewidth=1.3, label=curve.what)
    axes.annotate(f"{ys[-1]:.3f}", (xs[-1], ys[-1]), (5, 0), textcoords="offset points", fontsize=7, va="center")
