"""Parts of images that are kept while the rest is drawn anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vqscale.arguments import did_you_mean
from vqscale.data.bad import KINDS, BadSample
from vqscale.data.images import Pixels, decode
from vqscale.errors import UserError

Mask = NDArray[np.bool_]

HALVES = ("top-half", "bottom-half", "left-half", "right-half")


def pixel_mask(wanted: str, size: int) -> Mask:
    """Which pixels of an image are kept, bool [size, size].

    Args:
        wanted: one of `HALVES`, or an image file whose bright half of the grey levels is kept.
        size: side of the images; a file of another size is cropped and resized, as images are.

    Raises:
        UserError: no such half and no such file, or nothing or everything would be kept.
    """
    mask = np.zeros((size, size), bool)
    if wanted in HALVES:
        middle = size // 2
        halves = (np.s_[:middle], np.s_[middle:], np.s_[:, :middle], np.s_[:, middle:])
        mask[halves[HALVES.index(wanted)]] = True
        return mask
    path = Path(wanted)
    if not path.is_file():
        hint = did_you_mean(wanted, HALVES)
        raise UserError(
            f"no half and no file '{wanted}'", where="--keep", mend=f"{hint}{', '.join(HALVES)}, or an image"
        )
    mask[:] = read_image(path, size).mean(axis=2) >= 128
    if mask.all() or not mask.any():
        what = "everything" if mask.all() else "nothing"
        raise UserError(f"{path} keeps {what}", where="--keep", mend="what is white is kept, what is black is drawn")
    return mask


def kept_cells(mask: Mask, side: int) -> Mask:
    """Cells of a code grid that lie in the kept pixels with all of their square: bool [side, side]."""
    step = len(mask) // side
    squares = mask.reshape(side, step, side, step)
    return np.logical_and.reduce(squares, axis=(1, 3), out=np.empty((side, side), bool))


def hide(images: Pixels, mask: Mask) -> Pixels:
    """Images uint8 [n, S, S, 3] in which the kept pixels have grown over the others, as means of their neighbours.

    The codes of kept cells then say nothing of what was hidden, although encoders look beyond a cell's square.
    """
    colours = np.where(mask[..., None], images, 0).astype(np.float64)
    known = mask.astype(np.float64)
    while not known.all():
        weight = _neighbours(known[None, ..., None])[0, ..., 0]
        ring = (known == 0) & (weight > 0)
        sums = _neighbours(colours)
        colours[:, ring] = sums[:, ring] / weight[ring, None]
        known[ring] = 1
    return np.rint(colours).astype(np.uint8)


def read_image(path: Path, size: int) -> Pixels:
    """An image file at a size, uint8 [size, size, 3].

    Raises:
        UserError: it cannot be read.
    """
    try:
        return decode(path.read_bytes(), size)
    except (OSError, BadSample) as error:
        why = KINDS[error.kind] if isinstance(error, BadSample) else f"cannot be read ({error.strerror})"
        raise UserError(why, where=str(path), mend="name a JPEG, PNG or WebP file") from None


def _neighbours(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the four neighbours, [n, S, S, c]."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total: NDArray[np.float64] = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    return total
