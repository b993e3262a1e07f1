"""The job of a run: recipe, profile and machine together, as the backends need them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.profile import Profile
from launcher.backends.base import Job
from launcher.backends.local import SOURCE
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.files import read_json


def make_job(recipe: Recipe, profile: Profile, run: Path, stages: Sequence[str]) -> Job:
    """A job with this interpreter, on this machine or on the nodes of the profile.

    Raises:
        UserError: the recipe asks for what the profile does not have.
    """
    limit, asked = profile.max_processes, recipe.resources.processes
    if limit is not None and asked > limit:
        raise UserError(
            f"asks for {asked} processes, profile {profile.name} allows {limit}",
            where="resources.processes",
            mend=f"use at most {limit}",
        )
    nodes, cores = _nodes(recipe, profile)
    return Job(recipe, profile, run, tuple(stages), sys.executable, SOURCE, cores, nodes)


def job_of(layout: RunLayout, stages: Sequence[str]) -> Job:
    """The job of a run directory, from its own record."""
    profile = Profile.model_validate(read_json(layout.info)["profile"])
    return make_job(layout.read_recipe(), profile, layout.root, stages)


def _nodes(recipe: Recipe, profile: Profile) -> tuple[int, int]:
    """Number of nodes, and the cores of each."""
    slurm, resources = profile.slurm, recipe.resources
    if slurm is None:
        return 1, len(os.sched_getaffinity(0))
    try:
        nodes = slurm.spread(resources.processes)
    except ValueError as error:
        mend = "use a multiple, or set slurm.nodes in the profile"
        raise UserError(f"{error} of profile {profile.name}", where="resources.processes", mend=mend) from None
    each = resources.processes // nodes
    if resources.device != "cpu" and slurm.gpus_per_node and each > slurm.gpus_per_node:
        raise UserError(
            f"{each} processes a node, but profile {profile.name} has {slurm.gpus_per_node} GPUs a node",
            where="resources.processes",
            mend=f"use at most {slurm.gpus_per_node * nodes}, or resources.device=cpu",
        )
    return nodes, slurm.cpus_per_task
