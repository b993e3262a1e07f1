"""The nearest-code search on a GPU: one fused kernel, and two that add up what was assigned to each code.

`_search` holds a block of centred vectors, lets all codes pass by, and keeps the best score and code of each lane in
registers: no score ever leaves the chip. Then it writes codes, code vectors and squared distances.

Products have the precision of fp32 on tensor cores ("3xTF32"): a = big + small, both rounded to TF32, and
a·b ≈ small·big + big·small + big·big, which leaves out less than 2⁻²² |a| |b|. That costs three products at TF32's
rate, which is half of bf16's. Plain fp32 ("ieee"), for GPUs without TF32, is not done by tensor cores: on a Hopper GPU
one product takes about twice as long as the three.

Sums are deterministic, without atomic operations: vectors are sorted by code, `_partial_sums` adds those of a code
within a chunk of the sorted order, and `_total_sums` adds the chunks of a code in their order.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_DIM = 256
"""Longest vectors that a block can hold."""

SHORT_KEYS = 2**15
"""Codebooks below it are sorted by 16 bits, in half the passes of a radix sort."""

_PARTS = 32  # partial sums that are added at a time
_HOPPER_SHARED, _OTHERS_SHARED = 227 * 1024, 96 * 1024


class Launch(NamedTuple):
    """How `_search` is cut into programs."""

    rows: int
    """Vectors of a program."""
    codes: int
    """Codes that it looks at together."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles of codes that are on their way at a time."""
    chunk: int
    """Dimensions that are multiplied together: all of them stay on the chip, a part is fetched again for each tile."""


HOPPER = {
    16: Launch(128, 128, 8, 3, 16),
    32: Launch(128, 64, 8, 3, 32),
    64: Launch(128, 64, 8, 3, 64),
    128: Launch(128, 32, 8, 2, 128),
    256: Launch(64, 32, 8, 1, 256),
}
"""By block of dimensions, for GPUs with the shared memory of a Hopper: the largest blocks that compile without spilling
registers for sm_90, since each program fetches the whole codebook. Not tuned by measurement yet."""

OTHERS, SMALL = Launch(128, 32, 8, 2, 32), Launch(32, 32, 4, 1, 32)
"""For GPUs with 96 KiB of shared memory or more, down to sm_80 without spilling; and for the rest."""


def choose(block_dim: int, size: int, shared_memory: int) -> Launch:
    """The launch for blocks of so many dimensions, a codebook of `size`, and a GPU's bytes of shared memory."""
    if shared_memory >= _HOPPER_SHARED:
        found = HOPPER[block_dim]
    elif shared_memory >= _OTHERS_SHARED:
        found = OTHERS
    else:
        found = SMALL
    codes = min(found.codes, max(16, triton.next_power_of_2(size)))
    return found._replace(codes=codes, chunk=min(found.chunk, block_dim))


@triton.jit
def _to_tf32(x: tl.tensor) -> tl.tensor:
    """Rounded to the 10 bits of a TF32's mantissa; half away from zero. What is not a number stays so."""
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # A GPU's own NaN, 0x7fffffff, would overflow into the sign, and become -0.
    return tl.where(x == x, rounded, x)


@triton.jit
def _prepare(
    codes: tl.tensor,
    centre: tl.tensor,
    big: tl.tensor,
    small: tl.tensor,
    half_norms: tl.tensor,
    size: tl.tensor,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_codes: tl.constexpr,
    split: tl.constexpr,
) -> None:
    """Negated, centred codes in two parts, padded with zeros, and their half squared norms, padded with infinity."""
    code = tl.program_id(0) * block_codes + tl.arange(0, block_codes)
    column = tl.arange(0, block_dim)
    known = (code < size)[:, None] & (column < dim)[None, :]
    value = tl.load(codes + code[:, None] * dim + column[None, :], mask=known, other=0.0)
    middle = tl.load(centre + column, mask=column < dim, other=0.0)
    table = tl.where(known, middle[None, :] - value, 0.0)
    half = tl.where(code < size, tl.sum(table * table, axis=1) / 2, float("inf"))
    place = code[:, None] * block_dim + column[None, :]
    if split:
        tl.store(big + place, _to_tf32(table))
        tl.store(small + place, _to_tf32(table - _to_tf32(table)))
    else:
        tl.store(big + place, table)
    tl.store(half_norms + code, half)


@triton.jit
def _latents(
    z: tl.tensor,
    centre: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    dim: tl.constexpr,
    split: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Big and small parts of centred vectors; the vectors themselves and nothing, if they are not split."""
    known = (row < n)[:, None] & (column < dim)[None, :]
    x = tl.load(z + row[:, None] * dim + column[None, :], mask=known, other=0.0).to(tl.float32)
    x -= tl.load(centre + column, mask=column < dim, other=0.0)[None, :]
    big = x
    small = x
    if split:
        big = _to_tf32(x)
        small = _to_tf32(x - big)
    return big, small


@triton.jit
def _add_products(
    score: tl.tensor,
    x: tl.tensor,
    x_small: tl.tensor,
    big: tl.tensor,
    small: tl.tensor,
    code: tl.tensor,
    column: tl.tensor,
    block_dim: tl.constexpr,
    split: tl.constexpr,
) -> tl.tensor:
    """Scores plus the products of vectors and codes over some columns."""
    place = code[None, :] * block_dim + column[:, None]
    table = tl.load(big + place)
    if split:
        products = tl.dot(x_small, table, input_precision="tf32")
        products = tl.dot(x, tl.load(small + place), products, input_precision="tf32")
        products = tl.dot(x, table, products, input_precision="tf32")
    else:
        products = tl.dot(x, table, input_precision="ieee")
    return score + products


@triton.jit
def _search(
    z: tl.tensor,
    codes: tl.tensor,
    centre: tl.tensor,
    big: tl.tensor,
    small: tl.tensor,
    half_norms: tl.tensor,
    nearest: tl.tensor,
    vectors: tl.tensor,
    distance: tl.tensor,
    n: tl.tensor,
    padded: tl.tensor,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    chunk: tl.constexpr,
    block_rows: tl.constexpr,
    block_codes: tl.constexpr,
    stages: tl.constexpr,
    split: tl.constexpr,
    wanted: tl.constexpr,
) -> None:
    """Nearest code, code vector and squared distance of a block of vectors."""
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_dim)
    lane = tl.arange(0, block_codes)
    if chunk == block_dim:
        x, x_small = _latents(z, centre, row, column, n, dim, split)
    # NaN is never less: a row that holds it keeps code 0.
    best = tl.full([block_rows, block_codes], float("inf"), tl.float32)
    tile_of_best = tl.zeros([block_rows, block_codes], tl.int32)
    for start in tl.range(0, padded, block_codes, num_stages=stages):
        score = tl.load(half_norms + start + lane)[None, :] + tl.zeros([block_rows, block_codes], tl.float32)
        if chunk == block_dim:
            score = _add_products(score, x, x_small, big, small, start + lane, column, block_dim, split)
        else:
            for begin in tl.range(0, block_dim, chunk):
                part = begin + tl.arange(0, chunk)
                y, y_small = _latents(z, centre, row, part, n, dim, split)
                score = _add_products(score, y, y_small, big, small, start + lane, part, block_dim, split)
        nearer = score < best  # strictly: of equally near codes a lane keeps the first
        best = tl.where(nearer, score, best)
        tile_of_best = tl.where(nearer, start, tile_of_best)
    least = tl.min(best, axis=1)
    code = tl.min(tl.where(best == least[:, None], tile_of_best + lane[None, :], padded), axis=1)
    tl.store(nearest + row, code.to(tl.int64), mask=row < n)
    if wanted:
        total = tl.zeros([block_rows], tl.float32)
        for begin in tl.range(0, block_dim, chunk):
            part = begin + tl.arange(0, chunk)
            known = (row < n)[:, None] & (part < dim)[None, :]
            place = row[:, None] * dim + part[None, :]
            picked = tl.load(codes + code[:, None] * dim + part[None, :], mask=known, other=0.0)
            away = tl.load(z + place, mask=known, other=0.0).to(tl.float32) - picked
            total += tl.sum(away * away, axis=1)
            tl.store(vectors + place, picked.to(vectors.dtype.element_ty), mask=known)
        tl.store(distance + row, total, mask=row < n)


@triton.jit
def _partial_sums(
    z: tl.tensor,
    order: tl.tensor,
    ordered: tl.tensor,
    partial: tl.tensor,
    n: tl.tensor,
    size: tl.tensor,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_rows: tl.constexpr,
) -> None:
    """Sums of each code in one chunk of the sorted vectors.

    Along the sorted order the chunk, the code, or both go up. So chunk + code names each sum once, and the sums of one
    code lie together, in the order of the chunks.
    """
    chunk = tl.program_id(0)
    place = chunk * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_dim)
    inside = place < n
    row = tl.load(order + place, mask=inside, other=0)
    code = tl.load(ordered + place, mask=inside, other=0).to(tl.int32)
    code = tl.where(inside, code, size)
    known = inside[:, None] & (column < dim)[None, :]
    x = tl.load(z + row[:, None] * dim + column[None, :], mask=known, other=0.0).to(tl.float32)
    current = tl.min(code, axis=0)
    while current < size:
        total = tl.sum(tl.where((code == current)[:, None], x, 0.0), axis=0)
        tl.store(partial + (chunk + current).to(tl.int64) * dim + column, total, mask=column < dim)
        current = tl.min(tl.where(code > current, code, size), axis=0)


@triton.jit
def _total_sums(
    partial: tl.tensor,
    bags: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    block_rows: tl.constexpr,
    block_parts: tl.constexpr,
) -> None:
    """Count and sum of one code, whose vectors are bags[code] to bags[code + 1] of the sorted order."""
    code = tl.program_id(0)
    column = tl.arange(0, block_dim)
    begin = tl.load(bags + code)
    end = tl.load(bags + code + 1)
    first = begin // block_rows
    parts = tl.where(end > begin, (end - 1) // block_rows - first + 1, 0)
    total = tl.zeros([block_dim], tl.float32)
    for start in range(0, parts, block_parts):
        part = start + tl.arange(0, block_parts)
        known = (part < parts)[:, None] & (column < dim)[None, :]
        place = (first + code + part)[:, None] * dim + column[None, :]
        total += tl.sum(tl.load(partial + place, mask=known, other=0.0), axis=0)
    tl.store(sums + code * dim + column, total, mask=column < dim)
    tl.store(counts + code, (end - begin).to(tl.float32))


def assign(
    z: Tensor, codes: Tensor, vectors: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `vqscale::assign` returns; see `vqscale.models.nearest.Assignment`.

    Args:
        z: [N, D], D at most `LARGEST_DIM`, any float dtype.
        codes: fp32 [K, D].
        vectors: whether vectors, distances and their sum are wanted.
        statistics: whether counts and sums are wanted.
    """
    z, codes = z.contiguous(), codes.contiguous()
    with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
        nearest, picked, distance = _run_search(z, codes, vectors)
        error = distance.sum(dtype=torch.float64).float().view(1)
        empty = codes.new_empty(0), codes.new_empty(0, codes.shape[1])
        counts, sums = sum_by_code(z, nearest, len(codes)) if statistics else empty
    return nearest, picked, distance, error, counts, sums


@cache
def _facts(device: torch.device) -> tuple[int, bool]:
    """Bytes of shared memory that a program may use, and whether there is TF32."""
    if device.type != "cuda":
        return _HOPPER_SHARED, True  # Triton's interpreter, which follows the path of a Hopper GPU
    facts = torch.cuda.get_device_properties(device)
    shared_memory = getattr(facts, "shared_memory_per_block_optin", facts.shared_memory_per_block)  # not on AMD
    return shared_memory, facts.major >= 8 and torch.version.hip is None


def _block_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _run_search(z: Tensor, codes: Tensor, vectors: bool) -> tuple[Tensor, Tensor, Tensor]:
    (n, dim), size = z.shape, len(codes)
    shared_memory, split = _facts(z.device)
    block_dim = _block_dim(dim)
    launch = choose(block_dim, size, shared_memory)
    padded = triton.cdiv(size, launch.codes) * launch.codes
    centre = codes.mean(dim=0)
    big, half_norms = codes.new_empty(padded, block_dim), codes.new_empty(padded)
    small = torch.empty_like(big) if split else big
    nearest = torch.empty(n, dtype=torch.int64, device=z.device)
    picked, distance = z.new_empty(n if vectors else 0, dim), codes.new_empty(n if vectors else 0)
    _prepare[(padded // launch.codes,)](
        codes, centre, big, small, half_norms, size, dim, block_dim, launch.codes, split
    )
    if n:
        _search[(triton.cdiv(n, launch.rows),)](
            *(z, codes, centre, big, small, half_norms, nearest, picked, distance, n, padded),
            *(dim, block_dim, launch.chunk, launch.rows, launch.codes, launch.stages, split, vectors),
            num_warps=launch.warps,
        )
    return nearest, picked, distance


def sum_by_code(z: Tensor, nearest: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Counts fp32 [size] and sums fp32 [size, D] of the vectors of each code, always added in the same order."""
    n, dim = z.shape
    block_dim = _block_dim(dim)
    rows = min(max(16, triton.next_power_of_2(n // size + 1)), 128, 8192 // block_dim)
    keys = nearest.to(torch.int16 if size < SHORT_KEYS else torch.int32)
    ordered, order = torch.sort(keys, stable=True)
    bags = torch.searchsorted(ordered, torch.arange(size + 1, dtype=keys.dtype, device=z.device))
    chunks = triton.cdiv(n, rows)
    partial = torch.empty(chunks + size, dim, device=z.device)
    counts, sums = torch.empty(size, device=z.device), torch.empty(size, dim, device=z.device)
    if n:
        _partial_sums[(chunks,)](z, order, ordered, partial, n, size, dim, block_dim, rows)
    _total_sums[(size,)](partial, bags, counts, sums, dim, block_dim, rows, _PARTS)
    return counts, sums
