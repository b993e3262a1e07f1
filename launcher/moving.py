"""Lets a run go on elsewhere: on another profile, or with other resources. What is trained does not change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cluster.profile import Profile
from launcher.backends import backend_for
from launcher.job import make_job
from launcher.plan import load_profile
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.config.load import dump_yaml, load_recipe
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.files import read_json, write_bytes, write_json

_ROOM = "resources."


def move(layout: RunLayout, on: str | None, changes: Sequence[str]) -> None:
    """Change where a run that nobody runs goes on; its record says so.

    Args:
        layout: the run.
        on: name or path of the profile; None for the one that it has.
        changes: `resources.KEY=VALUE` texts.

    Raises:
        UserError: a setting is not of the resources, or the profile cannot run what is left; nothing has changed then.
    """
    for text in changes:
        _refuse_the_experiments(text.partition("=")[0])
    info: dict[str, Any] = read_json(layout.info)
    before = Profile.model_validate(info["profile"])
    profile = load_profile(on) if on else before
    recipe = load_recipe(layout.recipe, changes)
    _refuse_other_files(layout.read_recipe(), recipe)
    left = [stage for stage in RunState.read(layout).stages if not layout.done(stage).exists()]
    backend_for(profile).check(make_job(recipe, profile, layout.root, left))
    # What a dead supervisor left there must not write beside the new one. Hosts over ssh end by themselves when nobody
    # speaks to them; one that is lost may be why the run is moved.
    if profile != before and before.ssh is None:
        backend_for(before).cancel(layout)
    moves = [*info.get("moves", []), {"time": time.time(), "profile": profile.name, "overrides": list(changes)}]
    write_bytes(layout.recipe, dump_yaml(recipe).encode())
    write_json(layout.info, {**info, "profile": profile.model_dump(mode="json"), "moves": moves})


def _refuse_the_experiments(key: str) -> None:
    if not key.startswith(_ROOM):
        mend = f"only {_ROOM}* can change; vqscale submit makes a new run with other settings"
        raise UserError("is a part of the experiment", where=key, mend=mend)


def _refuse_other_files(old: Recipe, new: Recipe) -> None:
    """By what the recipes come to, since a key above may be set, too."""
    before, now = _files(old), _files(new)
    for key in before:
        if before[key] != now[key]:
            raise UserError(
                "cannot change in a run that has begun", where=key, mend="leave it out, or submit a new run"
            )


def _files(recipe: Recipe) -> dict[str, int | str]:
    """Settings that say where the run's files are, and which task has made what of them."""
    arrays = {f"{_ROOM}stages.{stage}.array": recipe.resources.array_of(stage) for stage in recipe.stages}
    return {f"{_ROOM}checkpoints": recipe.resources.checkpoints, **arrays}
