"""The report as one HTML file that needs nothing beside it: figures by what they are about, bars, pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p.about { color: #666; margin-top: .2rem }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top }
td.figure { text-align: right; font-variant-numeric: tabular-nums }
td.meaning { color: #666 }
.bar { background: #3b7dd8; height: .8rem; display: inline-block; min-width: 1px }
img { max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd } p.about, td.meaning { color: #999 } img { border-color: #444 }
}
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the report."""

    caption: str
    png: bytes


@dataclass(frozen=True)
class Topic:
    """Figures that belong together."""

    title: str
    about: str
    figures: Mapping[str, str]
    """Key of the report → what it means. A key that ends in `_` stands for all keys that begin with it."""


TOPICS = (
    Topic(
        "Reconstructions",
        "Held-out images through the tokenizer and back; each figure a mean over images.",
        {
            "held_out_images": "images",
            "psnr": "peak signal-to-noise ratio, dB",
            "ssim": "structural similarity, 1 for equal images",
            "mse": "mean squared error, pixels in [0, 1]",
            "l1": "mean absolute error, pixels in [0, 1]",
            "mse_over_variance": "error over the variance of the pixels: 1 is a plain grey image",
            "lpips": "difference as VGG16 sees it, 0 for equal images",
            "rfid": "Fréchet distance between images and reconstructions",
            "rfid_images": "images that it is over",
            "hour_accuracy_reconstructed": "clocks that still show their hour",
        },
    ),
    Topic(
        "Codebooks",
        "By level; usage and perplexity over the training images, entropy over the held-out ones.",
        {
            "usage_": "share of the codes that occur",
            "perplexity_": "as many codes as if all were used alike",
            "held_out_usage_": "share of the codes that occur in held-out images",
            "held_out_entropy_bits_": "entropy of a code, bits",
            "nearest_code_median_": "distance to the next code, in deviations of the codebook: median",
            "nearest_code_least_": "the least of them",
            "codes_differ_from_fp32": "share of codes that bf16 chose otherwise",
        },
    ),
    Topic(
        "Gaussian latents",
        "By level, over the held-out images.",
        {
            "kl_": "divergence of the posterior from N(0, 1), nats an image",
            "active_": "share of the units whose mean differs from image to image",
            "posteriors_differ_from_fp32": "distance that bf16 moves means, in standard deviations",
        },
    ),
    Topic(
        "Likelihood",
        "Bits that suffice to write a held-out image down: its latents, then its pixels given them.",
        {
            "bits_per_dim": "of pixels and codes together",
            "bits_per_dim_error": "standard error over images",
            "bits_per_dim_pixels": "of the pixels, given the codes",
            "bits_per_dim_codes": "of the codes, under the prior",
            "bits_per_dim_uniform": "with the uniform prior in its place",
            "bits_per_dim_latents": "of continuous latents: their divergence from the prior",
            "bits_per_dim_normal": "with the prior N(0, 1) in its place",
            "pixel_likelihood": "distribution of a pixel around its reconstruction",
            "codes_likelihood": "whether the prior's likelihood is exact or a bound",
            "nats_per_code": "nats a code",
            "nats_per_code_": "the same by level",
            "nats_per_value": "nats a value of continuous latents, of a density",
            "nats_per_value_": "the same by level",
        },
    ),
    Topic(
        "Samples",
        "Images drawn from the prior, with the reference and its size beside each figure that needs one.",
        {
            "samples": "images",
            "fid": "Fréchet distance to the reference",
            "fid_reference": "the reference",
            "fid_reference_images": "its images",
            "inception_score": "Inception Score",
            "inception_score_deviation": "its deviation over ten parts",
            "precision": "samples that lie where the reference does",
            "recall": "reference that lies where the samples do",
            "precision_images": "images of each set that both are over",
            "hour_accuracy": "clocks that show the hour they were drawn for",
            "samples_unreadable": "samples that show no clock",
        },
    ),
)

BITS = {
    "code_bits_uniform": "uniform prior: every code alike",
    "code_bits_unused": "of it: codes that are rare anywhere",
    "code_bits_placed": "of it: codes that are rare at their place",
    "code_bits_positions": "what is left: each place for itself",
    "code_bits_learned": "learned prior: what neighbours tell, too",
    "code_bits_mutual_information": "between these images and their codes",
}
"""Where the bits of an image's codes go (`surgery`), drawn as bars."""


def page(report: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole document.

    Args:
        report: as in `report.json`; keys that it lacks are left out.
        pictures: shown in their order, at the end.
    """
    known = [_topic(topic, report) for topic in TOPICS]
    parts = [*known, _bits(report), _seconds(report), *map(_figure, pictures)]
    title = escape(f"{report.get('name', 'run')}: evaluation")
    body = "\n".join(part for part in parts if part)
    about = escape(str(report.get("run", "")))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        f'<h1>{title}</h1><p class="about">{about}</p>\n{body}\n</html>\n'
    )


def _topic(topic: Topic, report: Mapping[str, Any]) -> str:
    rows = [(name, report[name], meaning) for name, meaning in _rows(topic, report)]
    return _section(topic.title, topic.about, _table(rows)) if rows else ""


def _rows(topic: Topic, report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, meaning) of the topic's figures that the report has, each once."""
    seen = set()
    for key, meaning in topic.figures.items():
        fitting = [name for name in report if name.startswith(key)] if key.endswith("_") else [key]
        for name in fitting:
            if name in report and name not in seen and not isinstance(report[name], (dict, list)):
                seen.add(name)
                yield name, meaning


def _bits(report: Mapping[str, Any]) -> str:
    there = {name: float(report[name]) for name in BITS if name in report}
    if not there:
        return ""
    most = max(there.values())
    rows = "".join(
        f'<tr><td>{escape(BITS[name])}</td><td class="figure">{value:,.1f}</td>'
        f'<td><span class="bar" style="width:{max(0.0, value / most) * 20:.2f}rem"></span></td></tr>'
        for name, value in there.items()
    )
    return _section("Where the bits of the codes go", "Bits an image (ELBO surgery).", f"<table>{rows}</table>")


def _seconds(report: Mapping[str, Any]) -> str:
    times = report.get("seconds")
    if not isinstance(times, Mapping):
        return ""
    return _section("Time", "Seconds by stage.", _table([(name, value, "") for name, value in times.items()]))


def _table(rows: Sequence[tuple[str, Any, str]]) -> str:
    cells = (
        f'<tr><td><code>{escape(name)}</code></td><td class="figure">{escape(_text(value))}</td>'
        f'<td class="meaning">{escape(meaning)}</td></tr>'
        for name, value, meaning in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _section(title: str, about: str, content: str) -> str:
    return f'<h2>{escape(title)}</h2><p class="about">{escape(about)}</p>{content}'


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = escape(picture.caption)
    return f'<h2>{caption}</h2><img alt="{caption}" src="data:image/png;base64,{data}">'


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
