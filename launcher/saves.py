"""Whether a profile leaves time to save: its grace against what saves were measured to take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from launcher import registry
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import TRAINED
from vqscale.errors import UserError
from vqscale.events import newest
from vqscale.files import read_json

_LOOKED_AT = 5
"""Newest earlier runs of a recipe in which a measured save is looked for."""


def measured(layout: RunLayout) -> tuple[str, float] | None:
    """The slowest of the stages' last saves in a run: stage and seconds; None when none was measured."""
    found = []
    for stage in TRAINED:
        event = newest(layout.events(stage), "checkpoint").get("checkpoint")
        if event:
            found.append((stage, float(event.get("stall_s", 0)) + float(event.get("write_s", 0))))
    return max(found, key=lambda one: one[1], default=None)


def earlier_runs(name: str, profile: str) -> list[RunLayout]:
    """The newest runs of a recipe under a profile, the newest first."""
    found = []
    for entry in reversed(registry.entries()):
        info = _info(entry) if entry.id.startswith(f"{name}-") else None
        if info and info["name"] == name and info["profile"]["name"] == profile:
            found.append(RunLayout(entry.path))
        if len(found) == _LOOKED_AT:
            break
    return found


def _info(entry: registry.Entry) -> dict[str, Any] | None:
    """None where it cannot be read: a damaged run must not keep others from being planned."""
    try:
        info: dict[str, Any] | None = read_json(RunLayout(entry.path).info)
    except (UserError, OSError):
        return None
    return info


def short_of_time(layouts: Iterable[RunLayout], grace_s: int) -> list[str]:
    """A warning where the first run with a measured save took more than half of the grace for it."""
    for layout in layouts:
        save = measured(layout)
        if save is not None:
            stage, seconds = save
            if 2 * seconds <= grace_s:
                return []
            where = f"the last save of {stage} in {layout.id} took {seconds:.1f} s"
            return [f"{where}, more than half of grace_s ({grace_s} s): a preempted stage may not save; raise it"]
    return []
