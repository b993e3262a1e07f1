"""Recipes for tests: the smallest experiment that goes through every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from vqscale.config.load import parse
from vqscale.config.recipe import Recipe

_TRAINING = {"global_batch": 8, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 4, "hash_every": 2}


def tiny_tree(**overrides: Any) -> dict[str, Any]:
    """Plain values of the tiny recipe; a dotted key is given with `__` (`tokenizer__training__steps=2`)."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "image_size": 16,
            "clocks": {"train": 64, "validation": 16, "shards": 4},
            "streams": 2,
            "packet": 2,
            "shuffle": 16,
        },
        "tokenizer": {
            "levels": [
                {"name": "bottom", "downsample": 4, "codes": 16, "dim": 8},
                {"name": "top", "downsample": 2, "codes": 16, "dim": 8},
            ],
            "hidden": 16,
            "residual_blocks": 1,
            "residual_hidden": 8,
            "training": {**_TRAINING, "steps": 8, "picture_every": 4, "validate_every": 4},
        },
        "extract": {"batch": 16, "block": 8},
        "prior": {
            "networks": [{"layers": 1, "width": 16, "heads": 2}],
            "training": {**_TRAINING, "steps": 8, "picture_every": 4, "validate_every": 4},
        },
        "sample": {"per_class": 2, "batch": 16},
        "evaluate": {"batch": 16, "latents": {"images": 5, "draws": 8, "importance": 4}},
        "resources": {"processes": 1, "threads": 1, "device": "cpu"},
    }
    for key, value in overrides.items():
        *parents, last = key.split("__")
        node: Any = tree
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[last] = value
    return tree


def tiny_recipe(**overrides: Any) -> Recipe:
    """The tiny recipe, checked; overrides as for `tiny_tree`."""
    return parse(Recipe, tiny_tree(**overrides), "tiny_recipe")


def write_recipe(path: Path, **overrides: Any) -> Path:
    """The tiny recipe as a YAML file; not checked, so that faults can be planted."""
    path.write_text(yaml.safe_dump(tiny_tree(**overrides), sort_keys=False), encoding="utf-8")
    return path
