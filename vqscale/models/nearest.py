"""Nearest-code search without an N×K matrix in memory.

argmin over codes e of |z - e|² equals argmin of |e|²/2 - z·e, one matrix product a tile. Both sides are shifted
by the codebook's mean first: with uncentred latents the expansion cancels and picks wrong codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 1_024
"""Rows of one tile; a tile's scores (TILE × K fp32) stay in the cache for the codebook sizes of the field."""


@torch.no_grad()
def nearest_codes(z: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code of each vector, by Euclidean distance in fp32; ties go to the lowest index.

    Args:
        z: [N, D], any float dtype; searched in fp32 whatever autocast says.
        codes: [K, D] fp32.

    Returns:
        int64 [N] on z's device.
    """
    with torch.autocast(z.device.type, enabled=False):
        centre = codes.mean(dim=0)
        vectors, table = z.float() - centre, codes - centre
        half_norms = table.square().sum(dim=1) / 2
        nearest = torch.empty(len(vectors), dtype=torch.int64, device=z.device)
        buffer = torch.empty(min(TILE, len(vectors)), len(codes), device=z.device)
        for start in range(0, len(vectors), TILE):
            tile = vectors[start : start + TILE]
            scores = torch.addmm(half_norms, tile, table.T, alpha=-1, out=buffer[: len(tile)])
            nearest[start : start + TILE] = _row_argmin(scores)
    return nearest


def _row_argmin(scores: Tensor) -> Tensor:
    """Index of each row's minimum. On the CPU numpy's argmin is vectorised, torch's is not."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmin(axis=1))
    return scores.argmin(dim=1)
