"""Models that were trained on as many images each, side by side: figures as plain values, from what runs recorded.

What a run has not measured is None, which `vqscale/evaluation/comparison_page.py` shows as a dash: never a zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vqscale.stages import TRAINED

_OF_THE_BOUND = (
    *("pixels", "codes", "latents", "error", "is", "uniform", "normal", "codes_uniform", "latents_normal"),
    *("best", "best_error"),
)
"""What follows `bits_per_dim_` in a report without being another estimate of the same."""
_OF_AN_ESTIMATE = ("error", "effective", "gain")
"""The last word of what follows `estimate_` without being one."""


@dataclass(frozen=True)
class Outcome:
    """What there is of one member."""

    name: str
    about: str
    run: str
    """Name of its folder."""
    state: str
    """How its run stands: done, failed, running, ..."""
    message: str = ""
    """Why it is not done."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """As in `report.json`; empty where there is none."""
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stage → its marker `done.json`."""
    batches: Mapping[str, int] = field(default_factory=dict)
    """Stage that trains → samples of one step."""
    shares: Mapping[str, Any] | None = None
    """The run whose output it reads, and the stages that made it."""


def member_facts(outcome: Outcome) -> dict[str, Any]:
    """One member's figures; what is not known is None."""
    report, stages = outcome.report, outcome.stages
    plain = ("bits_per_dim", "bits_per_dim_error", "bits_per_dim_pixels", "mse", "psnr", "ssim")
    more = ("hour_accuracy", "hour_accuracy_reconstructed", "samples", "sampling_images_per_s", "held_out_images")
    return {
        "name": outcome.name,
        "about": outcome.about,
        "run": outcome.run,
        "state": outcome.state,
        "message": outcome.message,
        "shares": outcome.shares,
        **{key: report.get(key) for key in plain},
        "bits_per_dim_best": report.get("bits_per_dim_best", report.get("bits_per_dim")),
        "bits_per_dim_best_error": report.get("bits_per_dim_best_error", report.get("bits_per_dim_error")),
        "bits_per_dim_latents": report.get("bits_per_dim_codes", report.get("bits_per_dim_latents")),
        "estimate": estimate(report),
        "estimates": _behind(report, "bits_per_dim_", leave=_OF_THE_BOUND) | _estimates(report),
        "sharpness": _behind(report, "sharpness_"),
        **{key: report.get(key) for key in more},
        "usage": _behind(report, "usage_"),
        "active": _behind(report, "active_"),
        "parameters": {stage: stages.get(stage, {}).get("parameters") for stage in TRAINED},
        "images_seen": {stage: _seen(outcome, stage) for stage in TRAINED},
        "seconds": {**{stage: marker.get("seconds") for stage, marker in stages.items()}, **report.get("seconds", {})},
    }


def estimate(report: Mapping[str, Any]) -> str | None:
    """What the best figure of a report is: exact or a bound, and with which distribution of pixels."""
    named, pixels = report.get("bits_per_dim_best_is", report.get("bits_per_dim_is")), report.get("pixel_likelihood")
    return named if named is None or pixels == "exact" else f"{named}, pixels: {pixels}"


def comparison(record: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All that the page shows, as plain values.

    Args:
        record: `family`, `about`, `budget`, `published` and `note` of the list.
        outcomes: the members in their order.
    """
    common = {key: record.get(key) for key in ("family", "about", "budget", "published", "note")}
    return {**common, "members": [member_facts(outcome) for outcome in outcomes]}


def _seen(outcome: Outcome, stage: str) -> int | None:
    """Images that a stage was trained on: none where it has no weights, unknown before its end."""
    steps = outcome.stages.get(stage, {}).get("steps")
    return None if steps is None or stage not in outcome.batches else int(steps) * outcome.batches[stage]


def _behind(report: Mapping[str, Any], prefix: str, leave: Sequence[str] = ()) -> dict[str, float]:
    """The rest of each key that begins so → its figure."""
    names = [key.removeprefix(prefix) for key, value in report.items() if key.startswith(prefix) and _is_figure(value)]
    return {name: report[prefix + name] for name in names if name not in leave}


def _estimates(report: Mapping[str, Any]) -> dict[str, float]:
    """Those of continuous latents, in bits per dimension, of some of the held-out images."""
    found = _behind(report, "estimate_")
    return {name: value for name, value in found.items() if name.rpartition("_")[2] not in _OF_AN_ESTIMATE}


def _is_figure(value: Any) -> bool:
    return isinstance(value, float) and not isinstance(value, bool)
