"""How fast images can be decoded at all: loops over files in memory, without tars, order, labels or batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from benchmarks.timing import Contender
from vqscale.data import images

Decode = Callable[[bytes, NDArray[np.uint8]], object]
"""Decodes a file; may put the result into the given row, uint8 [size, size, 3]."""


def decode_only(data: bytes, row: NDArray[np.uint8]) -> object:
    """The JPEG decoder alone, at the file's own size."""
    return simplejpeg.decode_jpeg(data)


def decode_resize(data: bytes, row: NDArray[np.uint8]) -> None:
    """What our loader calls for each image."""
    images.decode_into(data, row)


def decode_in_place(data: bytes, row: NDArray[np.uint8]) -> None:
    """The JPEG decoder alone, for files that have the wanted size."""
    simplejpeg.decode_jpeg(data, buffer=row)


def loop(
    name: str, contents: Sequence[bytes], decode: Decode, *, threads: int, size: int, batch: int, count: int
) -> Contender:
    """A contender that decodes over and over into one buffer of a batch.

    Args:
        name: of the contender.
        contents: files in memory; each lap goes on where the last one ended.
        decode: what is done with each.
        threads: that share the work.
        size: side of the images.
        batch: rows of the buffer.
        count: files of a lap.
    """
    rows = np.ones((batch, size, size, 3), np.uint8)  # written, so that no lap meets fresh pages
    source = itertools.cycle(enumerate(contents))

    def some(jobs: Sequence[int]) -> None:
        for _ in jobs:
            number, data = next(source)
            decode(data, rows[number % batch])

    def work() -> float:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(some, [range(thread, count, threads) for thread in range(threads)]))
        return count

    return Contender(name, work)
