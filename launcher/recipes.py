"""Finds recipes: files of the user's, or those that come with vqscale, by name."""

from __future__ import annotations

from pathlib import Path

from vqscale.arguments import did_you_mean
from vqscale.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / "pipelines" / "recipes"
"""Folder of the packaged recipes; looked at, not imported, since pipelines import torch."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def family_names() -> list[str]:
    """Names of the packaged lists of families."""
    return sorted(path.stem for path in (RECIPES / "families").glob("*.yaml"))


def find_recipe(text: str, beside: Path | None = None) -> Path:
    """The file of a recipe.

    Args:
        text: path of a YAML file, or the name of a packaged recipe.
        beside: folder that a path may start from, besides the current one.

    Raises:
        UserError: neither; the line lists the names.
    """
    if beside and (beside / text).is_file():
        return beside / text
    return _find(text, RECIPES, recipe_names(), "recipe")


def find_family(text: str) -> Path:
    """The file that lists a family.

    Args:
        text: path of a YAML file, or the name of a packaged list.

    Raises:
        UserError: neither; the line lists the names.
    """
    return _find(text, RECIPES / "families", family_names(), "family")


def _find(text: str, folder: Path, names: list[str], what: str) -> Path:
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if text in names:
        return folder / f"{text}.yaml"
    hint = did_you_mean(Path(text).stem, names)
    fault = "is a directory" if path.is_dir() else f"no such {what}"
    raise UserError(fault, where=text, mend=f"{hint}give a YAML file or one of: {', '.join(names)}")
