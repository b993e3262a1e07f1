"""Whether a profile leaves time to save: its grace against what saves were measured to take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from launcher import registry
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.events import newest
from vqscale.files import read_json
from vqscale.stages import TRAINED

_LOOKED_AT = 5
"""Newest earlier runs of a recipe in which a measured save is looked for."""
_LOOKED_THROUGH = 200
"""Newest runs of the index among which those are looked for: each is a small file, maybe far away."""


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
    newest_first = registry.entries()[: -_LOOKED_THROUGH - 1 : -1]
    found = (RunLayout(entry.path) for entry in newest_first if _is_of(entry, name, profile))
    return list(itertools.islice(found, _LOOKED_AT))


def _is_of(entry: registry.Entry, name: str, profile: str) -> bool:
    """By its record, since `--run` gives ids of any name; one that cannot be read says nothing."""
    try:
        info = read_json(RunLayout(entry.path).info) or {}
        return bool(info.get("name") == name and info["profile"]["name"] == profile)
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return False


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
