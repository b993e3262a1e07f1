"""Writes results as tables and pictures: those that are kept into a document, those of a folder into a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import plots, report
from benchmarks.result import Prediction, Result, read_result
from vqscale.errors import UserError
from vqscale.files import write_bytes

RESULTS = Path(__file__).with_name("results")
IMAGES = "images/bench"
"""Where a document's pictures are, beside it."""
PAGE = "benchmarks.md"
"""The page of a folder of results."""
_BLOCK = re.compile(r"(<!-- results: begin -->\n).*?(<!-- results: end -->)", re.DOTALL)


def render(document: Path, results: Path = RESULTS) -> None:
    """Replace what stands between the marks of a document, and draw its pictures anew.

    Raises:
        UserError: the document cannot be read or has no marks, or matplotlib is missing.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(document), mend="check the path") from None
    text = rendered(text, results)
    plots.require()
    for path in sorted(results.glob("*.json")):
        plots.draw(read_result(path), document.parent / IMAGES / f"{path.stem}.png")
    write_bytes(document, text.encode())


def write_page(folder: Path) -> Path:
    """Write the page of all results in a folder, with the pictures that lie beside them; returns its path."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        picture = path.with_suffix(".png")
        sections.append(_section(read_result(path), picture.name if picture.exists() else None, "##"))
    head = (
        "# Benchmarks\n\nWritten by `vqscale bench` from the JSON beside it; read ratios, not figures. "
        "docs/benchmarks.md of vqscale says what each key means.\n"
    )
    page = folder / PAGE
    write_bytes(page, "\n".join([head, *sections]).encode())
    return page


def rendered(text: str, results: Path = RESULTS) -> str:
    """The document's text with the tables of all results of a folder.

    Raises:
        UserError: it has no marks.
    """
    tables = "\n".join(
        _section(read_result(path), f"{IMAGES}/{path.stem}.png", "###") for path in sorted(results.glob("*.json"))
    )
    text, replaced = _BLOCK.subn(lambda found: f"{found[1]}\n{tables}\n{found[2]}", text)
    if not replaced:
        raise UserError(
            "has no place for results",
            where="--render",
            mend="put in the lines `<!-- results: begin -->` and `<!-- results: end -->`",
        )
    return text


def _section(result: Result, picture: str | None, heading: str) -> str:
    parts = [f"{heading} {result.name}, {result.machine.name}\n", _machine_line(result)]
    if picture:
        parts.append(f"![Ratios of {result.name} with their intervals and goals]({picture})\n")
    ratios = [
        (f"`{key}`", report.number(value), report.interval(result, key), report.goal(result, key))
        for key, value in result.ratios.items()
    ]
    parts.append(_table(("ratio", "median", "95 % interval", "goal"), ratios))
    figures = [
        (f"`{key}`", report.number(one.median), report.spread(one), one.unit) for key, one in result.figures.items()
    ]
    parts.append(_table(("figure", "median", "p10 – p90", "unit"), figures))
    floors = [
        (f"`{key}`", report.number(one.median), report.spread(one), one.unit, one.formula)
        for key, one in result.floors.items()
    ]
    if floors:
        parts.append(_table(("floor", "median", "p10 – p90", "unit", "formula"), floors))
    if result.prediction:
        parts += _predicted(result.prediction)
    notes = "".join(f"- {line}\n" for line in report.remarks(result))
    return "\n".join([*parts, notes] if notes else parts)


def _predicted(prediction: Prediction) -> list[str]:
    """What a model says, where it was compared, and what it assumes."""
    numbers = sorted({x for curve in prediction.curves.values() for x, _ in curve.points})
    rows = [
        (f"`{key}`", *(f"{dict(curve.points)[x]:.4f}" if x in dict(curve.points) else "" for x in numbers), curve.what)
        for key, curve in prediction.curves.items()
    ]
    head = ("predicted, not measured", *(f"{x:,.0f} GPUs" for x in numbers), "for")
    compared = [
        (f"`{key}`", report.number(one.predicted), report.number(one.measured), f"{100 * one.off:+.0f} %", one.unit)
        for key, one in prediction.compared.items()
    ]
    return [
        _table(head, rows),
        *(
            [_table(("the model on this machine", "predicted", "measured", "off", "unit"), compared)]
            if compared
            else []
        ),
        "The prediction assumes:\n",
        "".join(f"- {line}\n" for line in prediction.assumptions),
    ]


def _machine_line(result: Result) -> str:
    machine = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if name != "vqscale")
    code = (result.commit.id or "no commit")[:12] + (" with changes" if result.commit.dirty else "")
    accelerators = "".join(f", {gpu}" for gpu in machine.gpus)
    hardware = f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB{accelerators}"
    return f"{result.started[:10]}, {hardware}; {code};\n{versions}.\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
