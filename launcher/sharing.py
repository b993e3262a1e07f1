"""Runs that share stages: what one of them makes, such as a tokenizer and its codes, the others read.

A run that shares has links to the other's folders in the place of its own, relative ones, so that a folder that holds
both can be moved. It has no such stages itself: neither its state nor its supervisor knows of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.files import read_json


@dataclass(frozen=True)
class Shares:
    """What a run takes from another."""

    run: Path
    """Directory of the run that makes it."""
    stages: tuple[str, ...]
    """Stages whose output it is."""

    def facts(self) -> dict[str, Any]:
        """Plain values for `run.json`."""
        return {"run": RunLayout(self.run).id, "stages": list(self.stages)}


def shared_stages(recipe: Recipe, other: Recipe) -> tuple[str, ...]:
    """Stages before the prior's that would make the same in both runs: those of equal data, and of equal tokenizers."""
    if (recipe.seed, recipe.data) != (other.seed, other.data):
        return ()
    same = {"generate", "pack"}
    places = (recipe.resources.checkpoints, other.resources.checkpoints)
    if (recipe.tokenizer, recipe.extract) == (other.tokenizer, other.extract) and not any(places):
        same |= {"tokenizer", "extract"}
    return tuple(stage for stage in recipe.stages if stage in same)


def link(layout: RunLayout, shares: Shares) -> None:
    """Put links to the other run's folders into a new one; those folders need not be there yet."""
    other = RunLayout(shares.run)
    for stage in shares.stages:
        mine, theirs = ((*each.outputs(stage), each.stage(stage)) for each in (layout, other))
        for place, target in zip(mine, theirs, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(target, place.parent))


def check_shared(layout: RunLayout) -> None:
    """Whether another run has made what this one shares with it.

    Raises:
        UserError: it has not; names the stage and the run.
    """
    shares = (read_json(layout.info) or {}).get("shares") or {"stages": ()}
    for stage in shares["stages"]:
        if not layout.done(stage).exists():
            what = f"stage '{stage}' of {shares['run']}, whose output this run reads, has not finished"
            raise UserError(what, where=layout.id, mend=f"vqscale requeue {shares['run']}")
