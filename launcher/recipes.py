"""Finds recipes: files of the user's, or those that come with vqscale, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from vqscale.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / "pipelines" / "recipes"
"""Folder of the packaged recipes; looked at, not imported, since pipelines import torch."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(text: str) -> Path:
    """The file of a recipe.

    Args:
        text: path of a YAML file, or the name of a packaged recipe.

    Raises:
        UserError: neither; the line lists the names.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return path
    names = recipe_names()
    if text in names:
        return RECIPES / f"{text}.yaml"
    near = difflib.get_close_matches(Path(text).stem, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    what = "is a directory" if path.is_dir() else "no such recipe"
    raise UserError(what, where=text, mend=f"{hint}give a YAML file or one of: {', '.join(names)}")
