"""The task of each kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from vqscale.config.recipe import Recipe
from vqscale.stages import TRAINED
from vqscale.training.build import build_tokenizer
from vqscale.training.dashboard import Layout
from vqscale.training.distributed import Ranks
from vqscale.training.engine import Engine
from vqscale.training.image_task import ImageTask
from vqscale.training.pixels_task import PixelsTask
from vqscale.training.prior_task import PriorTask
from vqscale.training.task import Task
from vqscale.training.tokenizer_task import TokenizerTask
from vqscale.training.vae_task import VAETask

TASKS: Mapping[str, type[ImageTask]] = {"vqvae2": TokenizerTask, "vae": VAETask, "pixels": PixelsTask}
"""How a tokenizer of each kind (`tokenizer.kind`) is trained; arguments as for `ImageTask`."""


def tokenizer_task(
    recipe: Recipe,
    ranks: Ranks,
    held_out: Callable[[], Iterable[NDArray[np.uint8]]],
    fixed: NDArray[np.uint8],
) -> ImageTask:
    """The recipe's tokenizer, with fresh weights from torch's generator, to be trained on these ranks; collective.

    Args:
        recipe: the settings.
        ranks: this rank.
        held_out: makes an iteration over this rank's share of the held-out images, uint8 [B, S, S, 3].
        fixed: images uint8 [n, S, S, 3] that are drawn into TensorBoard again and again.

    Raises:
        UserError: weights of a loss are missing, or settings do not fit the strategy.
    """
    settings = recipe.tokenizer
    strategy = recipe.resources.of("tokenizer").strategy
    engine = Engine(build_tokenizer(settings), settings.training, ranks, strategy)
    names = [level.name for level in recipe.levels]
    return TASKS[settings.kind](engine, settings, names, recipe.seed, held_out, fixed)


def charts(recipe: Recipe, stage: str) -> Layout:
    """What TensorBoard opens on for the recipe's trainings, by stage, up to and with this one."""
    tasks: Mapping[str, type[Task]] = {"tokenizer": TASKS[recipe.tokenizer.kind], "prior": PriorTask}
    known = recipe.stages[: recipe.stages.index(stage) + 1]
    return {name: tasks[name].charts(recipe) for name in known if name in TRAINED}
