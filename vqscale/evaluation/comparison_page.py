"""The comparison of a family as tables: one HTML page that needs nothing beside it, and the same in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from vqscale.evaluation.markup import Picture, document, figure, section

DASH = "–"
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A row of texts for each model; those of the literature stand aside."""

    title: str
    about: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    aside: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Column:
    """A column: its heading, and what stands in it; a dash where that is None."""

    head: str
    of: Callable[[Facts], Any]
    shown: Callable[[Any], str] = str

    def cell(self, member: Facts) -> str:
        """The text of one row."""
        value = self.of(member)
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return DASH if missing else self.shown(value)


def page(facts: Facts, pictures: Sequence[Picture], details: Mapping[str, Sequence[Picture]]) -> str:
    """The whole document.

    Args:
        facts: as `comparison` gives them.
        pictures: shown in their order, before the tables.
        details: name of a member → its own sheets.
    """
    parts = [*_unfinished_html(facts), *map(figure, pictures), *map(_html, tables(facts))]
    parts += [_details(member, details.get(member["name"], ())) for member in facts["members"]]
    title = f"{facts['family']}: {len(facts['members'])} models at equal budget"
    return document(title, head(facts), "\n".join(parts), wide=True)


def markdown(facts: Facts) -> str:
    """The tables in Markdown."""
    lines = [f"# {facts['family']}: {len(facts['members'])} models at equal budget", "", head(facts), ""]
    lines += [f"- **{name}** {why}" for name, why in _unfinished(facts)]
    for table in tables(facts):
        lines += ["", f"## {table.title}", "", table.about, "", _line(table.head), _line(["---"] * len(table.head))]
        lines += [_line(row) for row in table.rows]
        lines += [_line([f"*{cell}*" if cell else "" for cell in row]) for row in table.aside]
    return "\n".join(lines) + "\n"


def head(facts: Facts) -> str:
    """What is compared, and at which budget."""
    budget = facts["budget"]
    said = f"Each tokenizer was trained on {budget['tokenizer']:,} images, each prior on {budget['prior']:,}."
    return " ".join(filter(None, [facts.get("about"), said]))


def tables(facts: Facts) -> list[Table]:
    """All tables, in the order in which they are shown."""
    members = facts["members"]
    made = [_likelihoods(facts), _images(members), _latents(members), _cost(members)]
    others = _columns(members, "estimates", lambda value: f"{value:.4f}")
    if others:
        about = "In bits per dimension, of the first held-out images alone, so that they compare with each other only."
        made.insert(1, _table("Other estimates of log p(x)", about, members, others))
    return made


def _likelihoods(facts: Facts) -> Table:
    columns = [
        Column("bits/dim", lambda one: one["bits_per_dim_best"], lambda value: f"{value:.3f}"),
        Column("standard error", lambda one: one["bits_per_dim_best_error"], lambda value: f"±{value:.3f}"),
        Column("with one draw of the latents", lambda one: one["bits_per_dim"], lambda value: f"{value:.3f}"),
        Column("of it latents", lambda one: one["bits_per_dim_latents"], lambda value: f"{value:.4f}"),
        Column("of it pixels", lambda one: one["bits_per_dim_pixels"], lambda value: f"{value:.3f}"),
        Column("what it is", lambda one: one["estimate"]),
    ]
    about = (
        "Bits that suffice to write a held-out image down, per value; fewer are better. Bounds of different kinds are "
        "not equally tight."
    )
    table = _table("Likelihood", " ".join(filter(None, [about, facts.get("note")])), facts["members"], columns)
    empty = ("",) * 4
    published = facts.get("published") or ()
    aside = tuple((one["model"], "published", f"{one['bits_per_dim']:.2f}", *empty, one["source"]) for one in published)
    return Table(table.title, table.about, table.head, table.rows, aside)


def _images(members: Sequence[Facts]) -> Table:
    columns = [
        Column("MSE", lambda one: one["mse"], lambda value: f"{value:.5f}"),
        Column("PSNR, dB", lambda one: one["psnr"], lambda value: f"{value:.1f}"),
        *(_columns(members, "sharpness", lambda value: f"{value:.3g}") or [Column("sharpness", lambda one: None)]),
        Column("hours of reconstructions", lambda one: one["hour_accuracy_reconstructed"], _percent),
        Column("hours of samples", lambda one: one["hour_accuracy"], _percent),
    ]
    about = (
        "Of held-out images and of samples. Sharpness of reconstructions and samples is a share of the originals': "
        "below 1 is blur, above 1 noise."
    )
    return _table("Reconstructions and samples", about, members, _told(columns, members, "hours"))


def _latents(members: Sequence[Facts]) -> Table:
    columns = [
        Column("codes that occur", lambda one: one["usage"] or None, _by_level),
        Column("active units", lambda one: one["active"] or None, _by_level),
    ]
    about = "By level: share of the codebook that training images use, or of the units that tell images apart."
    return _table("Latents", about, members, columns)


def _cost(members: Sequence[Facts]) -> Table:
    def of(group: str, stage: str) -> Callable[[Facts], Any]:
        return lambda one: one[group].get(stage)

    seconds = [Column(stage, of("seconds", stage), lambda value: f"{value:.1f}") for stage in _stages(members)]
    columns = [
        Column("parameters: tokenizer", of("parameters", "tokenizer"), _whole),
        Column("prior", of("parameters", "prior"), _whole),
        Column("images seen: tokenizer", of("images_seen", "tokenizer"), _whole),
        Column("prior", of("images_seen", "prior"), _whole),
        Column("samples, images/s", lambda one: one["sampling_images_per_s"], lambda value: f"{value:.3g}"),
        *(replace(column, head=f"seconds: {column.head}") if not n else column for n, column in enumerate(seconds)),
        Column("shares with", lambda one: one["shares"] and one["shares"]["run"].rpartition(".")[2]),
    ]
    about = "Seconds of each stage's processes on the clock; of a stage that is shared, those of the run that made it."
    return _table("Cost", about, members, columns)


def _stages(members: Iterable[Facts]) -> list[str]:
    return list(dict.fromkeys(stage for member in members for stage in member["seconds"]))


def _columns(members: Sequence[Facts], group: str, shown: Callable[[Any], str]) -> list[Column]:
    """A column for each figure of a group that any member has."""
    names = dict.fromkeys(name for member in members for name in member[group])
    return [Column(name.replace("_", " "), lambda one, name=name: one[group].get(name), shown) for name in names]  # type: ignore[misc]


def _told(columns: Sequence[Column], members: Sequence[Facts], begins: str) -> list[Column]:
    """The columns without those that begin so and say nothing of anybody."""
    return [
        column
        for column in columns
        if not column.head.startswith(begins) or any(column.cell(member) != DASH for member in members)
    ]


def _table(title: str, about: str, members: Sequence[Facts], columns: Sequence[Column]) -> Table:
    rows = tuple(
        (member["name"], member["about"] or DASH, *(column.cell(member) for column in columns)) for member in members
    )
    return Table(title, about, ("member", "model", *(column.head for column in columns)), rows)


def _unfinished(facts: Facts) -> list[tuple[str, str]]:
    """(name, state and reason) of members without all of their figures."""
    return [
        (one["name"], f"{one['state']}: {one['message']}" if one["message"] else one["state"])
        for one in facts["members"]
        if one["state"] != "done"
    ]


def _unfinished_html(facts: Facts) -> list[str]:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(why)}</td></tr>" for name, why in _unfinished(facts))
    about = "Members without all of their figures, and why."
    return [section("Not finished", about, f"<table>{rows}</table>")] if rows else []


def _html(table: Table) -> str:
    top = "".join(f"<th>{escape(text)}</th>" for text in table.head)
    rows = [("", row) for row in table.rows] + [(' class="aside"', row) for row in table.aside]
    cells = "".join(f"<tr{kind}>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for kind, row in rows)
    return section(table.title, table.about, f"<table><tr>{top}</tr>{cells}</table>")


def _details(member: Facts, pictures: Sequence[Picture]) -> str:
    """A member's own sheets, folded; and where its report is."""
    if not pictures:
        return ""
    link = f'<p><a href="{escape(member["run"], quote=True)}/report.html">its report</a></p>'
    inside = "".join(map(figure, pictures))
    return f"<details><summary>{escape(member['name'])}</summary>{link}{inside}</details>"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _by_level(values: Mapping[str, float]) -> str:
    return ", ".join(f"{level} {share:.0%}" for level, share in values.items())
