"""From a trained prior and its tokenizer to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vqscale.arguments import did_you_mean
from vqscale.config.recipe import Sample
from vqscale.data.labels import NO_LABEL
from vqscale.data.sheet import labelled_sheet
from vqscale.errors import UserError
from vqscale.loading import TrainedTokenizer
from vqscale.models.generate import Sampling
from vqscale.models.prior import Prior
from vqscale.seeds import mix

PREVIEW_CLASSES, PREVIEW_PER_CLASS = 12, 4
PREVIEW_ROWS = 4  # where there are no classes


def draw_images(
    prior: Prior,
    tokenizer: TrainedTokenizer,
    settings: Sample,
    classes: Sequence[int],
    numbers: Sequence[int],
    known: Mapping[str, NDArray[np.int64]] | None = None,
) -> NDArray[np.uint8]:
    """Images uint8 [n, S, S, 3], one a class entry.

    Args:
        prior: in evaluation mode.
        tokenizer: the one that made the prior's codes, on the prior's device.
        settings: temperature, truncation, guidance, seed.
        classes: class indices; -1 for none.
        numbers: the samples' numbers; sample i depends on (settings.seed, i), its class and what is known of it alone.
        known: level name → codes [n, side, side] that stay as they are, negative where one is drawn; None draws all.
    """
    sampling = Sampling(
        settings.temperature, settings.top_k, settings.top_p, settings.guidance, settings.guidance_schedule
    )
    seeds = [mix(settings.seed, number) for number in numbers]
    labels = prior.classes_of(torch.tensor(classes, dtype=torch.int64, device=tokenizer.device))
    kept = (
        [torch.from_numpy(known[name]).to(tokenizer.device) for name in reversed(tokenizer.levels)] if known else None
    )
    grids = prior.generate(labels, seeds, sampling, kept)
    by_level = dict(zip(reversed(tokenizer.levels), (grid.cpu().numpy() for grid in grids), strict=True))
    return tokenizer.decode(by_level)


def preview(
    prior: Prior, tokenizer: TrainedTokenizer, settings: Sample, names: Sequence[str] = ()
) -> NDArray[np.uint8]:
    """A sheet uint8 [H, W, 3] of a few samples: a row for each of the first classes, always the same seeds.

    Args:
        prior: in evaluation mode.
        tokenizer: the one that made the prior's codes.
        settings: as for `draw_images`.
        names: of the classes.
    """
    rows = min(PREVIEW_CLASSES, prior.classes) or PREVIEW_ROWS
    classes = [number if prior.classes else NO_LABEL for number in range(rows) for _ in range(PREVIEW_PER_CLASS)]
    images = draw_images(prior, tokenizer, settings, classes, range(len(classes)))
    captions = list(names[:rows]) or [f"{1 + row * PREVIEW_PER_CLASS}" for row in range(rows)]
    return labelled_sheet(dict(zip(captions, images.reshape(rows, PREVIEW_PER_CLASS, *images.shape[1:]), strict=True)))


def labels_to_draw(settings: Sample, names: Sequence[str]) -> tuple[int, ...]:
    """Class of every image that the settings ask for: the chosen classes take turns; -1 where there are no classes.

    Raises:
        UserError: a class that there is not.
    """
    chosen = chosen_classes(settings, names) or range(len(names)) or [NO_LABEL]
    count = settings.count or settings.per_class * len(chosen)
    return tuple(chosen[number % len(chosen)] for number in range(count))


def chosen_classes(settings: Sample, names: Sequence[str]) -> list[int]:
    """The classes that the settings name; empty where they name none. Raises as `labels_to_draw`."""
    return [_class_number(wanted, names) for wanted in settings.classes]


def _class_number(wanted: int | str, names: Sequence[str]) -> int:
    """A class by its name, else by its index."""
    if str(wanted) in names:
        return names.index(str(wanted))
    if str(wanted).isdecimal() and int(wanted) < len(names):
        return int(wanted)
    if not names:
        raise UserError("the prior knows no classes", where="sample.classes", mend="leave it empty")
    hint = did_you_mean(str(wanted), names)
    raise UserError(f"no class '{wanted}'", where="sample.classes", mend=f"{hint}a name, or 0 to {len(names) - 1}")
