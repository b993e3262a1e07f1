"""What passes from stage to stage, verified before a stage's processes start: by markers, manifests and file sizes.

It costs a few small files on the host, where the stage itself would find out with all its GPUs waiting.
"""

from __future__ import annotations

from contextlib import suppress

from launcher.sharing import check_shared
from launcher.state import RunState
from vqscale.checkpoint.folder import open_stored, steps
from vqscale.checkpoint.manifest import CODES_OF, FaultError
from vqscale.config.inputs import check_codes, check_images
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.files import read_json

NEEDS = {
    "pack": "generate",
    "tokenizer": "pack",
    "extract": "tokenizer",
    "prior": "extract",
    "sample": "prior",
    "evaluate": "sample",
}
"""The stage whose output each stage reads."""

_READ_IMAGES = ("tokenizer", "extract", "evaluate")
_READ_TOKENIZER = ("extract", "sample", "evaluate")


def need_of(recipe: Recipe, stage: str) -> str | None:
    """The stage whose output a stage reads; None where it reads nothing that a stage has made."""
    # Samples are read back on clocks alone; on other images the report is about reconstructions.
    return "tokenizer" if stage == "evaluate" and not recipe.data.clocks else NEEDS.get(stage)


def check_handover(layout: RunLayout, stage: str) -> None:
    """Whether all that a stage reads of earlier ones is there and whole.

    Raises:
        UserError: names what is not, and who makes it.
    """
    recipe, need = layout.read_recipe(), None
    if stage in recipe.stages:
        need = need_of(recipe, stage)
    if need in RunState.read(layout.whole).stages and not layout.whole.done(str(need)).exists():
        raise UserError(f"stage '{need}' has not finished", where=stage, mend=f"vqscale requeue {layout.id}")
    check_shared(layout.whole)
    if stage == "pack":
        _check_folders(layout)
    if stage in _READ_IMAGES:
        for split in ("train", "validation"):
            check_images(layout.shards(recipe, split))
    if stage in _READ_TOKENIZER:
        _made_by(layout, recipe, "tokenizer")
    if stage == "prior":
        _check_codes(layout, recipe)
    if stage == "sample":
        _check_prior(layout, recipe)
    if stage == "evaluate" and need == "sample" and not (layout.samples / "samples.json").exists():
        raise UserError("has no samples.json", where=str(layout.samples), mend="run the stage 'sample' first")


def _check_folders(layout: RunLayout) -> None:
    for split in ("train", "validation"):
        folder = layout.images(split)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise UserError("holds no images", where=str(folder), mend="run the stage 'generate' first")


def _check_codes(layout: RunLayout, recipe: Recipe) -> None:
    """Codes that this run has extracted carry the fingerprint that the extraction has put down."""
    places = [layout.code_shards(recipe, split) for split in ("train", "validation")]
    found = check_codes(recipe, places[0], places[1])
    said = (read_json(layout.whole.done("extract")) or {}).get("fingerprint", found)
    if not recipe.data.codes and said != found:
        mend = "run the stage 'extract' again"
        raise UserError("was made by another tokenizer than the extraction says", where=places[0], mend=mend)


def _check_prior(layout: RunLayout, recipe: Recipe) -> None:
    """The prior knows the codes that this run's extraction wrote, where it wrote any."""
    said = (read_json(layout.whole.done("extract")) or {}).get("fingerprint")
    knows = _made_by(layout, recipe, "prior").get(CODES_OF)
    if said and knows and said != knows:
        where = layout.checkpoints(recipe, "prior")
        raise UserError("was trained on codes of another tokenizer", where=where, mend="train the prior again")


def _made_by(layout: RunLayout, recipe: Recipe, stage: str) -> dict[str, str]:
    """What the newest committed checkpoint of a stage says of where it comes from."""
    where = layout.checkpoints(recipe, stage)
    for step in steps(where):
        with suppress(FaultError):
            return dict(open_stored(where, step).manifest.made_by)
    raise UserError("has no committed checkpoint", where=where, mend=f"run the stage '{stage}' first")
