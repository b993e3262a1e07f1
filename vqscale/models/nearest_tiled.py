"""The nearest-code search in plain torch, for devices without anything better: CUDA where Triton is missing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 2**22
"""Scores of a tile; their memory is all that is needed besides copies of the codes."""


@torch.no_grad()
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
    with torch.autocast(z.device.type, enabled=False):
        nearest = _search(z, codes)
        picked = F.embedding(nearest, codes) if vectors else codes[:0]
        distance = (z.float() - picked).square().sum(dim=1) if vectors else codes.new_empty(0)
        error = distance.sum(dtype=torch.float64).float().view(1)
        counts, sums = _statistics(z, nearest, len(codes)) if statistics else (codes.new_empty(0), codes[:0].clone())
        return nearest, picked.to(z.dtype), distance, error, counts, sums


def _search(z: Tensor, codes: Tensor) -> Tensor:
    # In fp64 where there is TF32: whether products of fp32 may be rounded to it is a setting of the whole process.
    dtype = torch.float64 if z.device.type == "cuda" else torch.float32
    centre = codes.mean(dim=0)
    table = (centre - codes).to(dtype)
    half_norms = table.square().sum(dim=1) / 2
    nearest = torch.empty(len(z), dtype=torch.int64, device=z.device)
    rows = max(1, SCORES // len(codes))
    for start in range(0, len(z), rows):
        tile = (z[start : start + rows] - centre).to(dtype)
        nearest[start : start + rows] = torch.addmm(half_norms, tile, table.T).argmin(dim=1)
    return nearest


def _statistics(z: Tensor, nearest: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sorted by code and added bag by bag: always in the same order, which index-add on a GPU is not."""
    ordered, order = torch.sort(nearest, stable=True)
    bags = torch.searchsorted(ordered, torch.arange(size + 1, device=z.device))
    return bags.diff().float(), F.embedding_bag(order, z.float(), bags, mode="sum", include_last_offset=True)
