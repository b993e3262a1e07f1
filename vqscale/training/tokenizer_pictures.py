"""What TensorBoard shows of a tokenizer: reconstructions, what each level carries, code grids, codebooks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vqscale.data.sheet import colour_codes, labelled_sheet, tile
from vqscale.models.pixels import to_uint8
from vqscale.models.quantizer import Codebook, LevelFigures
from vqscale.models.vqvae import VQVAE
from vqscale.training.tracking import Tracker

_COLUMNS = 8


def draw_images(tracker: Tracker, step: int, images: NDArray[np.uint8], rebuilt: Tensor) -> None:
    """Images uint8 [n, S, S, 3], each beside its reconstruction, [n, 3, S, S] in [-1, 1]."""
    pairs = np.stack([images, to_uint8(rebuilt)], axis=1)
    tracker.picture(step, "images/input_and_reconstruction", tile(pairs.reshape(-1, *pairs.shape[2:]), _COLUMNS))


def draw_prior(tracker: Tracker, step: int, images: Tensor) -> None:
    """What the tokenizer makes of latents from its own prior, [n, 3, S, S] in [-1, 1]."""
    tracker.picture(step, "images/from_the_prior", tile(to_uint8(images), _COLUMNS))


def draw_levels(tracker: Tracker, step: int, names: Sequence[str], network: VQVAE, codes: Sequence[Tensor]) -> None:
    """A row for each level alone, the others held at their mean, and one for all of them; and the grids in colour.

    Args:
        tracker: of rank 0.
        step: finished steps.
        names: of the levels, the finest first.
        network: in evaluation.
        codes: grids int64 [n, side, side] of the same images, the finest level first.
    """
    shown = [grid[:_COLUMNS] for grid in codes]
    rows = {f"{name} alone": to_uint8(network.decode_alone(shown, level)) for level, name in enumerate(names)}
    whole = to_uint8(network.decode(shown))
    if len(names) > 1:
        tracker.picture(step, "images/levels", labelled_sheet({"all levels": whole} | dict(reversed(rows.items()))))
    for name, grid in zip(names, codes, strict=True):
        tracker.picture(step, f"codes/{name}", tile(colour_codes(grid.cpu().numpy(), whole.shape[1]), _COLUMNS))


def draw_usage(tracker: Tracker, step: int, names: Sequence[str], levels: Sequence[LevelFigures]) -> None:
    """How often the codes of each level were assigned in the last step, as a distribution over the codes."""
    for name, figures in zip(names, levels, strict=False):
        tracker.histogram(step, f"{name}/assignments", figures.counts.cpu().numpy())


def draw_codebooks(
    tracker: Tracker, step: int, names: Sequence[str], network: VQVAE, levels: Sequence[LevelFigures]
) -> None:
    """The codebooks for the projector, each code with its number and its assignments in the last step."""
    books: list[Codebook] = list(network.codebooks)  # type: ignore[arg-type]
    for name, book, figures in zip(names, books, levels, strict=False):
        labels = [[str(code), f"{int(count)}"] for code, count in enumerate(figures.counts.tolist())]
        tracker.embedding(step, f"codebook_{name}", book.codes.cpu().numpy(), labels, ["code", "assignments"])
