"""Writes the tables of the results that are kept in `benchmarks/results` into a document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.result import Result, read_result
from vqscale.errors import UserError
from vqscale.files import write_bytes

RESULTS = Path(__file__).with_name("results")
_BLOCK = re.compile(r"(<!-- results: begin -->\n).*?(<!-- results: end -->)", re.DOTALL)


def render(document: Path, results: Path = RESULTS) -> None:
    """Replace what stands between the marks of a document.

    Raises:
        UserError: the document cannot be read or has no marks.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(document), mend="check the path") from None
    write_bytes(document, rendered(text, results).encode())


def rendered(text: str, results: Path = RESULTS) -> str:
    """The document's text with the tables of all results of a folder.

    Raises:
        UserError: it has no marks.
    """
    tables = "\n".join(_section(read_result(path)) for path in sorted(results.glob("*.json")))
    text, replaced = _BLOCK.subn(lambda found: f"{found[1]}\n{tables}\n{found[2]}", text)
    if not replaced:
        raise UserError(
            "has no place for results",
            where="--render",
            mend="put in the lines `<!-- results: begin -->` and `<!-- results: end -->`",
        )
    return text


def _section(result: Result) -> str:
    parts = [f"### {result.name}, {result.machine.name}\n", _machine_line(result)]
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
    notes = "".join(f"- {line}\n" for line in report.remarks(result))
    return "\n".join([*parts, notes] if notes else parts)


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
