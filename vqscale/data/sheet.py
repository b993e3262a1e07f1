"""Many small pictures on one: tiles, code grids in colour, contact sheets with captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_PAD = 4


def tile(images: NDArray[np.uint8], columns: int, pad: int = 1) -> NDArray[np.uint8]:
    """Images uint8 [n, H, W, 3] side by side, row by row, on white: uint8 [H', W', 3]."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + pad) - pad, columns * (width + pad) - pad, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + pad), i % columns * (width + pad)
        sheet[top : top + height, left : left + width] = image
    return sheet


def code_colours(vectors: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """A colour for each code, uint8 [K, 3], from a codebook [K, D]: codes that lie close together look alike.

    Red, green and blue are a code's ranks along the first three principal axes of the codebook.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    # An axis and its negative are the same: the one whose largest part is positive is taken.
    axes = axes[:3] * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1))[:3]
    ranks = (centred @ axes.T).argsort(axis=0).argsort(axis=0)
    colours = np.full((len(vectors), 3), 128, np.uint8)
    colours[:, : ranks.shape[1]] = np.rint(ranks * (255 / max(1, len(vectors) - 1)))
    return colours


def colour_codes(codes: NDArray[np.integer], palette: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Code grids [n, side, side] as pictures uint8 [n, size, size, 3], in the colours [K, 3] of `code_colours`."""
    scale = max(1, size // codes.shape[1])
    return palette[codes].repeat(scale, axis=1).repeat(scale, axis=2)


def labelled_sheet(rows: Mapping[str, NDArray[np.uint8]], side: int = 64) -> NDArray[np.uint8]:
    """A row of images for each caption.

    Args:
        rows: caption to images uint8 [n, S, S, 3]; rows may differ in length.
        side: least side of an image on the sheet in pixels; smaller images are enlarged by a whole factor.

    Returns:
        uint8 [H, W, 3].
    """
    size = next(iter(rows.values())).shape[1]
    scale = max(1, side // size)
    font = ImageFont.load_default(16)
    margin = max((int(font.getlength(name)) for name in rows), default=0) + 2 * _PAD
    step = size * scale + _PAD
    width = margin + max(len(images) for images in rows.values()) * step
    sheet = Image.new("RGB", (width, len(rows) * step + _PAD), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, images) in enumerate(rows.items()):
        top = number * step + _PAD
        pen.text((_PAD, top + step // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            picture = Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
            sheet.paste(picture, (margin + column * step, top))
    return np.asarray(sheet)
