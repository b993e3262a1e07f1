"""Nearest codes of vectors, and what is known with them, without a matrix of vectors by codes in memory.

The nearest code e of z has the least |e|²/2 - z·e: one matrix product, a tile at a time. Both sides are shifted by the
codebook's mean first: with uncentred latents the expansion cancels and picks wrong codes. Three ways do it, chosen by
the device: `nearest_cpu`, the fused kernels of `nearest_triton`, and `nearest_tiled` for what has neither.

To torch it is one operator, `vqscale::assign`, which `torch.compile` does not look into.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vqscale.models import nearest_cpu, nearest_tiled

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Assignment:
    """Vectors and their nearest codes."""

    codes: Tensor
    """int64 [N]: the nearest code of each vector; of equally near ones the lowest."""
    vectors: Tensor
    """[N, D] in the dtype of the input: the codes' vectors."""
    distance: Tensor
    """fp32 [N]: squared distance between a vector and its code, the code in fp32."""
    error: Tensor
    """fp32 [1]: sum of the distances."""
    counts: Tensor
    """fp32 [K]: vectors of each code; empty if not asked for."""
    sums: Tensor
    """fp32 [K, D]: their sums; empty if not asked for."""


def assign(z: Tensor, codes: Tensor, *, statistics: bool = False) -> Assignment:
    """Give each vector its nearest code, by Euclidean distance in fp32 whatever autocast says; without gradients.

    A vector that holds NaN gets code 0, and its distance is NaN. The same input gives the same output, bit by bit,
    on the CPU for any number of threads; a vector's code does not depend on the other vectors.

    Args:
        z: [N, D], any float dtype.
        codes: [K, D] fp32, finite.
        statistics: whether counts and sums are wanted.

    Raises:
        ValueError: vectors and codes differ in dimension.
    """
    return Assignment(*_assign(z, codes, True, statistics))


def nearest_codes(z: Tensor, codes: Tensor) -> Tensor:
    """The codes alone, as `assign` finds them: int64 [N] on z's device."""
    return _assign(z, codes, False, False)[0]


def tie_margin(dim: int, *, tensor_cores: bool = False) -> float:
    """How much further than the nearest the found code may be, relative to (|z - c| + |e - c|)²; c is the centre.

    That is, d²(found) - d²(nearest) ≤ tie_margin · (|z - c| + |e - c|)², e being the longer one of the two codes and
    d² the true squared distance. With the unit roundoff u = 2⁻²⁴ a score is wrong by no more than
    (D + 8) u (|z - c| |e - c| + |e - c|²/2): D rounded additions of the product (Higham, Accuracy and Stability of
    Numerical Algorithms, 2002, section 3.1), and the roundings of the two centred sides, of the norm and of the sum.
    Two scores count, and d² is twice a score. Rounding errors mostly cancel: a tenth of it is rarely seen.

    Args:
        dim: D.
        tensor_cores: whether the fused kernel found it, whose bound is eight times as large: three products in place
            of one, and sums that are cut off, not rounded.
    """
    return (8 if tensor_cores else 1) * (dim + 8) * 2.0**-23


def _assign(z: Tensor, codes: Tensor, vectors: bool, statistics: bool) -> Parts:
    if z.ndim != 2 or codes.ndim != 2 or z.shape[1] != codes.shape[1]:
        raise ValueError(f"vectors {tuple(z.shape)} and codes {tuple(codes.shape)} are not [N, D] and [K, D]")
    found: Parts = torch.ops.vqscale.assign(z.detach(), codes.detach().float(), vectors, statistics)
    return found


torch.library.define(
    "vqscale::assign",
    "(Tensor z, Tensor codes, bool vectors, bool statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("vqscale::assign", "cpu")(nearest_cpu.assign)


@torch.library.impl("vqscale::assign", "cuda")
def _on_gpu(z: Tensor, codes: Tensor, vectors: bool, statistics: bool) -> Parts:
    return _gpu_way(z.shape[1])(z, codes, vectors, statistics)


@cache
def _gpu_way(dim: int) -> Callable[[Tensor, Tensor, bool, bool], Parts]:
    """The fused kernels; plain torch, and a warning, where they cannot be had. Torch for CUDA brings Triton along."""
    try:
        kernels = importlib.import_module("vqscale.models.nearest_triton")
    except ImportError as error:
        why = f"{error}; pip install triton"
    else:
        if dim <= kernels.LARGEST_DIM:
            found: Callable[[Tensor, Tensor, bool, bool], Parts] = kernels.assign
            return found
        why = f"{dim} dimensions are more than its {kernels.LARGEST_DIM}"
    warnings.warn(f"nearest codes are searched without the fused kernel, many times slower: {why}", stacklevel=3)
    return nearest_tiled.assign


@torch.library.register_fake("vqscale::assign")
def _shapes(z: Tensor, codes: Tensor, vectors: bool, statistics: bool) -> Parts:
    (n, dim), size = z.shape, len(codes) if statistics else 0
    rows = n if vectors else 0
    return (
        z.new_empty(n, dtype=torch.int64),
        z.new_empty(rows, dim),
        codes.new_empty(rows),
        codes.new_empty(1),
        codes.new_empty(size),
        codes.new_empty(size, dim),
    )
