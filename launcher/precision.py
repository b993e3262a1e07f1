"""`precision: auto`, settled before a run starts, so that its stages, its attempts and what loads it later agree."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cluster.profile import Profile
from vqscale.config.recipe import Recipe
from vqscale.processor import has_bf16
from vqscale.stages import TRAINED

_GPUS = ("/dev/nvidia0", "/dev/kfd")  # CUDA's first device, and ROCm's


def settle(recipe: Recipe, profile: Profile) -> Recipe:
    """The recipe with bf16 or fp32 for each `auto`, by what the machines of the profile have."""
    changed = {}
    for stage in TRAINED:
        section = getattr(recipe, stage)
        if section.training.precision == "auto":
            training = section.training.model_copy(update={"precision": _quicker(recipe, profile, stage)})
            changed[stage] = section.model_copy(update={"training": training})
    return recipe.model_copy(update=changed)


def slow_stages(recipe: Recipe, profile: Profile) -> list[str]:
    """A warning where a settled recipe trains in bf16 on this machine's processor, which has no units for it."""
    slow = [
        stage
        for stage in TRAINED
        if stage in recipe.stages
        and getattr(recipe, stage).training.precision == "bf16"
        and profile.nodes_of(stage) is None
        and _quicker(recipe, profile, stage) == "fp32"
    ]
    what = "this processor has no units for bf16 and computes it several times slower than fp32"
    keys = " ".join(f"{stage}.training.precision=auto" for stage in slow)
    return [f"{' and '.join(slow)}: {what}; use {keys}"] if slow else []


def _quicker(recipe: Recipe, profile: Profile, stage: str) -> Literal["bf16", "fp32"]:
    """What a stage's device computes faster; fp32 on processors of other machines, of which nothing is known here."""
    device, nodes = recipe.resources.of(stage).device, profile.nodes_of(stage)
    if device == "cuda":
        return "bf16"
    if nodes is not None:
        return "bf16" if device == "auto" and nodes.gpus_per_node else "fp32"
    gpu = device == "auto" and any(Path(path).exists() for path in _GPUS)
    return "bf16" if gpu or has_bf16() else "fp32"
