"""The nearest-code search on the CPU: tiles of scores that stay in the cache, one chain of operations a thread.

A tile's scores |e|²/2 - z·e come from oneDNN as a 1×1 convolution with the norms as its bias: its kernels use AVX-512
on every processor that has it, while MKL, behind `torch.addmm`, does so on Intel's only. The minimum comes from numpy,
whose argmin is vectorised; torch's is not.

Every tile is computed by one thread and has the same shape whoever computes it, and sums are added in one order. So
nothing depends on the number of threads, nor a vector's code on how many others come with it.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vqscale.models.workers import single_core_threads

ROWS, COLUMNS = 1_024, 512
"""Vectors and codes of a tile. Its scores, 2 MiB, are most of what a thread holds."""

_LEAST_ROWS, _COLUMN_STEP = 64, 16
_MOST_THREADS = 16  # more would wait for the interpreter's lock: a tenth of a tile's time is Python
_CHUNK_ROWS, _CHUNK_VALUES = 2**16, 2**21  # vectors, and their values, that are sorted together, at most
_SHARE = 1_024  # codes whose sums a thread adds up together, at most

_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Blocks = list[tuple[Tensor, Tensor]]


def assign(
    z: Tensor, codes: Tensor, vectors: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `vqscale::assign` returns; see `vqscale.models.nearest.Assignment`.

    Args:
        z: [N, D], any float dtype.
        codes: fp32 [K, D].
        vectors: whether vectors, distances and their sum are wanted.
        statistics: whether counts and sums are wanted.
    """
    threads = min(_MOST_THREADS, torch.get_num_threads())
    search = Search(z, codes, vectors)
    search.run(threads)
    error = torch.tensor([search.distance.numpy().sum(dtype=np.float64)], dtype=torch.float32)
    size = len(codes) if statistics else 0
    counts, sums = sum_by_code(z if statistics else z[:0], search.nearest, size, threads)
    return search.nearest, search.vectors, search.distance, error, counts, sums


class Search:
    """One call: what its threads read and fill.

    Args:
        z: as for `assign`.
        codes: as for `assign`.
        vectors: whether the code vectors and distances are wanted besides the codes.
    """

    def __init__(self, z: Tensor, codes: Tensor, vectors: bool) -> None:
        self.z, self.codes = z, codes.contiguous()
        self.nearest = torch.empty(len(z), dtype=torch.int64)
        self.vectors = torch.empty(z.shape if vectors else (0, z.shape[1]), dtype=z.dtype)
        self.distance = torch.empty(len(z) if vectors else 0)
        self._wanted = vectors
        self._centre, self._blocks = _prepare(self.codes.numpy())

    def run(self, threads: int) -> None:
        """Fill `nearest` and, if wanted, `vectors` and `distance`."""
        starts = range(0, len(self.z), ROWS)
        threads = min(threads, len(starts))
        if threads:
            todo = iter(starts)  # shared: whoever is free takes the next tile
            with full_precision():
                list(single_core_threads(threads).map(lambda _: self._work(todo), range(threads)))

    @torch.inference_mode()
    def _work(self, todo: Iterator[int]) -> None:
        """One thread's part."""
        rows = min(ROWS, max(_LEAST_ROWS, 1 << (len(self.z) - 1).bit_length()))
        tile = _Tile(rows, self.z.shape[1], len(self._blocks))
        for start in todo:
            here = slice(start, start + ROWS)
            latents, nearest = self.z[here], self.nearest[here]
            tile.load(latents, self._centre)
            tile.search(self._blocks, len(self.codes), nearest.numpy())
            if self._wanted:
                tile.measure(latents, self.codes, nearest, self.vectors[here], self.distance[here])


def _prepare(codes: Floats) -> tuple[Tensor, Blocks]:
    """The centre [D], and negated, centred codes with their half squared norms in blocks of columns.

    All blocks have the same shape, so that equal codes have equal scores in all of them. They are filled up with copies
    of the last code, which is no further away than its copies.
    """
    size = len(codes)
    blocks = -(-size // COLUMNS)
    columns = -(-size // (blocks * _COLUMN_STEP)) * _COLUMN_STEP
    centre = codes.mean(axis=0)
    table = np.empty((blocks * columns, codes.shape[1]), np.float32)
    np.subtract(centre, codes, out=table[:size])
    table[size:] = table[size - 1]
    half_norms = np.vecdot(table, table) / 2
    starts = range(0, len(table), columns)
    return torch.from_numpy(centre), [
        (torch.from_numpy(table[start : start + columns]), torch.from_numpy(half_norms[start : start + columns]))
        for start in starts
    ]


class _Tile:
    """The buffers of one thread."""

    def __init__(self, rows: int, dim: int, blocks: int) -> None:
        self._staged = torch.zeros(rows, dim)
        self._picked = torch.empty(rows, dim)
        self._row = np.arange(rows)
        self._index = np.empty((blocks, rows), np.int64)
        self._score = np.empty((blocks, rows), np.float32)

    def load(self, latents: Tensor, centre: Tensor) -> None:
        """Take the latents in, centred; a last tile that is not full is filled up with zeros."""
        torch.sub(latents, centre, out=self._staged[: len(latents)])
        self._staged[len(latents) :].zero_()

    def search(self, blocks: Blocks, size: int, nearest: Ints) -> None:
        """Write the index of each row's nearest code; of equally near ones the lowest."""
        for block, codes in enumerate(blocks):
            self._search_block(block, *codes)
        block_of = self._score.argmin(axis=0) if len(blocks) > 1 else 0
        found = self._index[block_of, self._row] + block_of * len(blocks[0][1])
        np.minimum(found[: len(nearest)], size - 1, out=nearest)

    def _search_block(self, block: int, table: Tensor, half_norms: Tensor) -> None:
        # A function of its own, at whose end the scores are freed: the next block's then take their place.
        scores = _scores(self._staged, table, half_norms)
        scores.argmin(axis=1, out=self._index[block])
        if len(self._index) > 1:
            self._score[block] = scores[self._row, self._index[block]]

    def measure(self, latents: Tensor, codes: Tensor, nearest: Tensor, vectors: Tensor, distance: Tensor) -> None:
        """Write each row's code vector and the squared distance to it."""
        rows = len(latents)
        picked = vectors if vectors.dtype == torch.float32 else self._picked[:rows]
        torch.index_select(codes, 0, nearest, out=picked)
        vectors.copy_(picked)
        difference = torch.sub(latents, picked, out=self._staged[:rows]).numpy()
        np.vecdot(difference, difference, out=distance.numpy())


def _scores_onednn(latents: Tensor, table: Tensor, half_norms: Tensor) -> Floats:
    """Scores [rows, codes] of centred latents and the negated, centred codes."""
    rows, dim = latents.shape
    image = latents.view(1, rows, 1, dim).permute(0, 3, 1, 2)
    kernel = table.view(-1, dim, 1, 1).to(memory_format=torch.channels_last)
    found = torch.mkldnn_convolution(image, kernel, half_norms, (0, 0), (1, 1), (1, 1), 1)
    return found.permute(0, 2, 3, 1).reshape(rows, -1).numpy()


def _scores_blas(latents: Tensor, table: Tensor, half_norms: Tensor) -> Floats:
    return torch.addmm(half_norms, latents, table.T).numpy()


_scores: Callable[[Tensor, Tensor, Tensor], Floats] = _scores_onednn if _ONEDNN else _scores_blas


@torch.no_grad()
def sum_by_code(z: Tensor, nearest: Tensor, size: int, threads: int) -> tuple[Tensor, Tensor]:
    """Counts fp32 [size] and sums fp32 [size, D] of the vectors of each code.

    The vectors of a chunk are sorted by code (numpy sorts 16-bit keys by radix) and added bag by bag. Threads share the
    codes, so each sum is added up by one of them, chunk by chunk.
    """
    counts, sums = np.zeros(size, np.int64), torch.zeros(size, z.shape[1])
    step = max(1, min(_CHUNK_ROWS, _CHUNK_VALUES // z.shape[1]))
    share = min(_SHARE, -(-size // threads)) if size else 1
    for start in range(0, len(z), step):
        keys = nearest[start : start + step].numpy().astype(np.uint16 if size <= 2**16 else np.int32)
        bags = _Bags(z[start : start + step], keys, size)
        counts += bags.counts
        list(single_core_threads(threads).map(partial(bags.add_to, sums, share), range(0, size, share)))
    return torch.from_numpy(counts).float(), sums


class _Bags:
    """The vectors of a chunk, sorted by code."""

    def __init__(self, z: Tensor, keys: NDArray[Any], size: int) -> None:
        self._rows = z.float().contiguous()
        self._order = torch.from_numpy(keys.argsort(kind="stable"))
        self.counts = np.bincount(keys, minlength=size)
        self._ends = np.concatenate([[0], self.counts.cumsum()])

    @torch.inference_mode()
    def add_to(self, sums: Tensor, share: int, first: int) -> None:
        """Add the sums of `share` codes from the first one on."""
        ends = self._ends[first : first + share + 1]
        order, bags = self._order[ends[0] : ends[-1]], torch.from_numpy(ends - ends[0])
        sums[first : first + share] += F.embedding_bag(order, self._rows, bags, mode="sum", include_last_offset=True)


_settings: list[Any] = [torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
_inside = 0
_before: list[str] = []
_changing = threading.Lock()


@contextmanager
def full_precision() -> Iterator[None]:
    """Let oneDNN compute fp32 in fp32: it may be set to bf16 or TF32, for this process as a whole.

    The first of several searches at a time sets it, the last one puts it back.
    """
    global _inside
    with _changing:
        _inside += 1
        if _inside == 1:
            _before[:] = [setting.fp32_precision for setting in _settings]
            _set_precision("ieee" if value in ("bf16", "tf32") else value for value in _before)
    try:
        yield
    finally:
        with _changing:
            _inside -= 1
            if not _inside:
                _set_precision(_before)


def _set_precision(values: Iterable[str]) -> None:
    for setting, value in zip(_settings, values, strict=True):
        if setting.fp32_precision != value:
            setting.fp32_precision = value
