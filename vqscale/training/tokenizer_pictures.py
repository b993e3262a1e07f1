"""What TensorBoard shows of a tokenizer: reconstructions, what each level carries, code grids, codebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vqscale.data.sheet import code_colours, colour_codes, labelled_sheet, tile
from vqscale.models.pixels import to_uint8
from vqscale.models.quantizer import Codebook
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
    books: list[Codebook] = list(network.codebooks)  # type: ignore[arg-type]
    for name, grid, book in zip(names, codes, books, strict=True):
        colours = code_colours(book.codes.cpu().numpy())
        tracker.picture(
            step, f"codes/{name}", tile(colour_codes(grid.cpu().numpy(), colours, whole.shape[1]), _COLUMNS)
        )


def draw_usage(tracker: Tracker, step: int, counts: Mapping[str, Tensor]) -> None:
    """How often the codes of each level were assigned over the last steps, as a distribution over the codes."""
    for name, of_codes in counts.items():
        tracker.histogram(step, f"{name}/assignments", of_codes.cpu().numpy())


def draw_codebooks(tracker: Tracker, step: int, network: VQVAE, counts: Mapping[str, Tensor]) -> None:
    """The codebooks for the projector, each code with its number and its assignments over the last steps."""
    books: list[Codebook] = list(network.codebooks)  # type: ignore[arg-type]
    for (name, of_codes), book in zip(counts.items(), books, strict=True):
        labels = [[str(code), str(count)] for code, count in enumerate(of_codes.tolist())]
        tracker.embedding(step, f"codebook_{name}", book.codes.cpu().numpy(), labels, ["code", "assignments"])
