"""The report's page: every figure once, nothing that could be read as markup, pictures inside."""

from __future__ import annotations

import base64
import re
from typing import Any

from vqscale.evaluation.markup import Picture
from vqscale.evaluation.page import BITS, page

REPORT: dict[str, Any] = {
    "name": "<script>alert(1)</script>",
    "run": "/runs/a&b",
    "psnr": 27.123456,
    "held_out_images": 1200,
    "usage_top": 0.5,
    "usage_bottom": 1.0,
    "nats_per_code": 2.5,
    "nats_per_code_top": 3.0,
    "hour_accuracy_by_hour": [1.0, 0.5],
    **dict.fromkeys(BITS, 10.0),
    "code_bits_unused": -1e-12,
    "seconds": {"tokenizer": 12.5},
}


def test_every_figure_is_shown_once_and_nothing_is_markup() -> None:
    text = page(REPORT, [Picture("sheet", 'a "caption" <b>', b"png")])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "/runs/a&amp;b" in text
    for name in ("psnr", "usage_top", "usage_bottom", "nats_per_code", "nats_per_code_top", "tokenizer"):
        assert text.count(f"<code>{name}</code>") == 1, name
    assert "27.12" in text
    assert "hour_accuracy_by_hour" not in text, "lists are in report.json"
    assert 'alt="a &quot;caption&quot; &lt;b&gt;"' in text
    assert f'src="data:image/png;base64,{base64.b64encode(b"png").decode()}"' in text


def test_sizes_and_references_stand_beside_what_depends_on_them() -> None:
    sizes = {"fid": 3.5, "fid_samples": 36, "fid_reference": "train", "fid_reference_images": 40}
    text = page({**REPORT, **sizes, "cas_samples": 0.5, "cas_held_out_images": 7}, [])
    assert "Fréchet distance of 36 samples to 40 images of train" in text
    assert "names right of 7 real" in text
    assert "learned from – samples" in text, "the report does not say"


def test_what_no_topic_knows_is_shown_at_the_end() -> None:
    text = page({**REPORT, "something_new": 0.25}, [])
    more = text[text.index("<h2>More</h2>") :]
    assert "<code>something_new</code>" in more
    assert "<code>psnr</code>" not in more


def test_charts_of_the_codes() -> None:
    text = page({**REPORT, "code_shares_top": [0.5, 0.25, 0.25], "code_distances_top": [0.0, 1.0]}, [])
    assert text.count("<svg ") == 2
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', text)]
    assert heights == [90, 45, 45, 0, 90]


def test_bars_are_as_long_as_their_figures() -> None:
    widths = [float(width) for width in re.findall(r"width:([\d.]+)rem", page(REPORT, []).split("</style>")[1])]
    assert widths == [0.0 if name in ("code_bits_unused", "image_bits_reconstruction") else 20.0 for name in BITS]


def test_what_the_report_lacks_has_no_heading() -> None:
    text = page({"name": "x", "psnr": 1.0}, [])
    assert "<h2>Reconstructions</h2>" in text
    for title in ("Samples", "Likelihood", "Codebooks", "Where the bits", "Time"):
        assert f"<h2>{title}" not in text
