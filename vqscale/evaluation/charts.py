"""Small bar charts as SVG, to stand inside a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT, _BELOW = 320, 90, 18


def bars(values: Sequence[float], title: str, left: str, right: str) -> str:
    """Bars side by side, the largest as high as the chart.

    Args:
        values: not negative.
        title: what is shown; for those who cannot see it, too.
        left: stands below the first bar.
        right: stands below the last one.
    """
    most, step = max([*values, 0.0]) or 1.0, _WIDTH / max(1, len(values))
    drawn = "".join(
        f'<rect x="{number * step:.2f}" y="{_HEIGHT * (1 - value / most):.2f}" width="{max(1.0, step - 1):.2f}" '
        f'height="{_HEIGHT * value / most:.2f}"/>'
        for number, value in enumerate(values)
    )
    below, caption = _HEIGHT + _BELOW - 4, escape(title)
    return (
        f'<figure><figcaption>{caption}</figcaption><svg class="chart" role="img" aria-label="{caption}" '
        f'width="{_WIDTH}" height="{_HEIGHT + _BELOW}">{drawn}'
        f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/><text x="0" y="{below}">{escape(left)}</text>'
        f'<text x="{_WIDTH}" y="{below}" text-anchor="end">{escape(right)}</text></svg></figure>'
    )
