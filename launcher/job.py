"""The job of a run: recipe, profile and machine together, as the backends need them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.profile import Profile
from launcher.backends.base import SOURCE, Job, Place
from vqscale.arguments import did_you_mean
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.files import read_json
from vqscale.stages import STAGES


def make_job(recipe: Recipe, profile: Profile, run: Path, stages: Sequence[str], task: int | None = None) -> Job:
    """A job with this interpreter, on this machine or on the nodes of the profile.

    Raises:
        UserError: the recipe asks for what the profile does not have.
    """
    _check_stages(profile)
    places = {stage: _place(recipe, profile, stage) for stage in stages}
    return Job(recipe, profile, run, tuple(stages), sys.executable, SOURCE, places, task)


def job_of(layout: RunLayout, stages: Sequence[str], without: Sequence[str] = ()) -> Job:
    """The job of a run directory, or of one task, from its own record; `without` some of the profile's machines."""
    profile = Profile.model_validate(read_json(layout.info)["profile"])
    profile = profile.without(without) if without else profile
    return make_job(layout.read_recipe(), profile, layout.root, stages, layout.task)


def _check_stages(profile: Profile) -> None:
    """The profile knows nothing of recipes, so the names in it are compared here."""
    unknown = [name for name in profile.slurm.stages if name not in STAGES] if profile.slurm else []
    if unknown:
        mend = f"{did_you_mean(unknown[0], STAGES)}stages: {', '.join(STAGES)}"
        raise UserError(f"no stage '{unknown[0]}'", where=f"slurm.stages of profile {profile.name}", mend=mend)


def _place(recipe: Recipe, profile: Profile, stage: str) -> Place:
    """The machines of a stage."""
    resources, key = recipe.resources.of(stage), recipe.resources.key(stage, "processes")
    limit, asked = profile.max_processes, resources.processes
    if limit is not None and asked > limit:
        raise UserError(
            f"asks for {asked} processes, profile {profile.name} allows {limit}", where=key, mend=f"use at most {limit}"
        )
    section = profile.nodes_of(stage)
    if section is None:
        return Place(len(os.sched_getaffinity(0)))
    try:
        nodes = section.spread(asked)
    except ValueError as error:
        mend = f"use a multiple, or other nodes in the profile's section `{profile.backend}`"
        raise UserError(f"{error} of profile {profile.name}", where=key, mend=mend) from None
    each, gpus = asked // nodes, section.gpus_per_node
    if resources.device != "cpu" and gpus and each > gpus:
        raise UserError(
            f"{each} processes a node, but profile {profile.name} has {gpus} GPUs a node",
            where=key,
            mend=f"use at most {gpus * nodes}, or resources.device=cpu",
        )
    return Place(section.cores_per_node, nodes)
