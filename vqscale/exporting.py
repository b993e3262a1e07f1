"""From a finished run to a folder that others can use: `vqscale export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from vqscale import storage
from vqscale.card import card
from vqscale.checkpoint.folder import steps
from vqscale.config.exported import CARD, CONFIG, PRIOR, TOKENIZER, Exported
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.files import read_json
from vqscale.loading import class_names, load_prior, load_tokenizer
from vqscale.model_files import pack_weights, stored, write_exported
from vqscale.training.checkpoints.fitting import require_prior_of


def export_run(layout: RunLayout, place: str | Path, *, replace: bool = False) -> Exported:
    """Write a run's tokenizer, and its prior if it is trained, with config and card.

    Args:
        layout: the run.
        place: a folder, or a URL of any storage that can be written to.
        replace: whether an exported model that is there may be replaced.

    Raises:
        UserError: the run has no trained tokenizer, or something is there already.
    """
    _require_room(place, replace)
    recipe = layout.read_recipe()
    tokenizer = load_tokenizer(layout.root)
    files = {TOKENIZER: pack_weights(tokenizer.network)}
    priors = layout.checkpoints(recipe, "prior")
    has_prior = bool(steps(priors))
    classes: tuple[str, ...] = ()
    if has_prior:
        require_prior_of(tokenizer.fingerprint, priors)
        files[PRIOR] = pack_weights(load_prior(layout.root))
        classes = class_names(layout, recipe)
    exported = Exported(
        name=recipe.name,
        image_size=recipe.data.image_size,
        tokenizer=recipe.tokenizer,
        prior=recipe.prior if has_prior else None,
        classes=classes,
        fingerprint=tokenizer.fingerprint,
        files={name: stored(data) for name, data in files.items()},
        made_by=_made_by(layout, recipe),
    )
    text = card(exported, recipe, _markers(layout, recipe), read_json(layout.report) or {})
    write_exported(place, exported, {**files, CARD: text.encode()})
    return exported


def _require_room(place: str | Path, replace: bool) -> None:
    names = storage.list_names(place) or []
    if not names:
        return
    if CONFIG not in names:
        raise UserError("is not an empty folder", where=str(place), mend="name another one")
    if not replace:
        raise UserError("holds an exported model", where=str(place), mend="name another folder, or add --force")


def _made_by(layout: RunLayout, recipe: Recipe) -> dict[str, Any]:
    code = read_json(layout.code / "identity.json") or {}
    return {
        "run": layout.id,
        "recipe": recipe.name,
        "commit": code.get("commit"),
        "uncommitted_changes": code.get("uncommitted"),
        "sources_sha256": code.get("sources_sha256"),
        "torch": torch.__version__,
        "created": time.time(),
    }


def _markers(layout: RunLayout, recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {stage: marker for stage in recipe.stages if (marker := read_json(layout.done(stage)))}
