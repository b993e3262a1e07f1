"""Parts of HTML pages that need nothing beside them: the frame with its style, sections, pictures."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
body.wide { max-width: none; margin: 2rem } .wide table { font-size: 14px; white-space: nowrap }
th { color: #666; font-weight: 600; border-bottom: 1px solid #ccc } tr.aside td { color: #666; font-style: italic }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p.about { color: #666; margin-top: .2rem }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top }
td.figure { text-align: right; font-variant-numeric: tabular-nums }
td.meaning { color: #666 }
figure { display: inline-block; margin: .5rem 1.5rem .5rem 0 } figcaption { color: #666; font-size: 13px }
.chart rect { fill: #3b7dd8 } .chart line { stroke: #999 } .chart text { fill: #666; font-size: 11px }
.bar { background: #3b7dd8; height: .8rem; display: inline-block; min-width: 1px }
img { max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd } img { border-color: #444 }
  p.about, td.meaning, figcaption { color: #999 } .chart text { fill: #999 }
}
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    name: str
    caption: str
    png: bytes


def document(title: str, about: str, body: str, wide: bool = False) -> str:
    """A whole page.

    Args:
        title: plain text, for the head and the heading.
        about: a line of plain text below the heading.
        body: HTML.
        wide: whether it may be as wide as the window, for tables of many columns.
    """
    name, place = escape(title), ' class="wide"' if wide else ""
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>\n'
        f'<body{place}><h1>{name}</h1><p class="about">{escape(about)}</p>\n{body}\n</body></html>\n'
    )


def section(title: str, about: str, content: str) -> str:
    """A part of a page: plain title and text above HTML."""
    return f'<h2>{escape(title)}</h2><p class="about">{escape(about)}</p>{content}'


def figure(picture: Picture) -> str:
    """A picture below its caption, inside the page."""
    data = base64.b64encode(picture.png).decode()
    caption = escape(picture.caption)
    return f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">'


def text(value: Any) -> str:
    """A value as it is shown, floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
