"""Several squares of one stored image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vqscale.data.bad import BadSample
from vqscale.data.images import Bytes, Pixels, decode_into, decode_whole
from vqscale.data.resize import resize
from vqscale.seeds import mix

SMALLEST = 0.8
"""Least side of a random square, as a share of the image's short side."""


@dataclass(frozen=True)
class Crops:
    """The centre square, then random ones: a function of seed, key and number alone."""

    count: int
    """Squares of each image."""
    seed: int

    def decode_each(self, files: Sequence[Bytes | None], keys: Sequence[str], out: Pixels) -> list[tuple[int, str]]:
        """As `images.decode_each`, with the files' keys, into uint8 [files, count, size, size, 3]."""
        bad = []
        for place, (data, key) in enumerate(zip(files, keys, strict=True)):
            if data is not None:
                try:
                    self._decode(data, key, out[place])
                except BadSample as error:
                    bad.append((place, error.kind))
        return bad

    def _decode(self, data: Bytes, key: str, out: Pixels) -> None:
        decode_into(data, out[0])
        size = out.shape[1]
        whole = decode_whole(data, math.ceil(size / SMALLEST))
        for number in range(1, self.count):
            resize(_square(whole, size, np.random.default_rng(mix(self.seed, key, number))), out[number])


def _square(image: Pixels, size: int, rng: np.random.Generator) -> Pixels:
    """A random square as a view; smaller than `size` only where the image is."""
    height, width, _ = image.shape
    short = min(height, width)
    share, down, right = rng.random(3)
    side = max(round(short * (SMALLEST + (1 - SMALLEST) * share)), min(size, short))
    top, left = round(down * (height - side)), round(right * (width - side))
    return image[top : top + side, left : left + side]
