"""From a trained prior and its tokenizer to images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vqscale.config.recipe import Sample
from vqscale.data.sheet import tile
from vqscale.export import TrainedTokenizer
from vqscale.models.generate import Sampling
from vqscale.models.prior import Prior
from vqscale.seeds import mix

PREVIEW_CLASSES, PREVIEW_PER_CLASS = 12, 4


def draw_images(
    prior: Prior,
    tokenizer: TrainedTokenizer,
    settings: Sample,
    classes: Sequence[int],
    numbers: Sequence[int],
) -> NDArray[np.uint8]:
    """Images uint8 [n, S, S, 3], one a class entry.

    Args:
        prior: in evaluation mode.
        tokenizer: the one that made the prior's codes, on the prior's device.
        settings: temperature, truncation, guidance, seed.
        classes: class indices; `prior.no_class` for none.
        numbers: the samples' numbers; sample i depends on (settings.seed, i) and its class alone.
    """
    sampling = Sampling(
        settings.temperature, settings.top_k, settings.top_p, settings.guidance, settings.guidance_schedule
    )
    seeds = [mix(settings.seed, number) for number in numbers]
    grids = prior.generate(torch.tensor(classes, device=tokenizer.device), seeds, sampling)
    by_level = dict(zip(reversed(tokenizer.levels), (grid.cpu().numpy() for grid in grids), strict=True))
    return tokenizer.decode(by_level)


def preview(prior: Prior, tokenizer: TrainedTokenizer, settings: Sample) -> NDArray[np.uint8]:
    """A sheet uint8 [H, W, 3] of a few samples: a column a class, always the same seeds."""
    columns = min(PREVIEW_CLASSES, prior.classes) or PREVIEW_CLASSES
    classes = [i if prior.classes else prior.no_class for i in range(columns)] * PREVIEW_PER_CLASS
    images = draw_images(prior, tokenizer, settings, classes, range(len(classes)))
    return tile(images, columns)
