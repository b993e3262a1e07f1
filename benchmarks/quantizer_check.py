"""Whether the contenders of benchmark `quantizer` find the right codes, by fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.harness import Bench
from vqscale.models.nearest import assign, tie_margin

SAMPLE = 4_096
"""Vectors that are compared with fp64."""

_OTHERS = 1e-5  # of peers that do not centre, relative to the same lengths
_SUMS = 1e-5


class Problem(Protocol):
    """What is searched."""

    @property
    def codes(self) -> Tensor:
        """fp32 [K, D]."""

    @property
    def sets(self) -> Sequence[Tensor]:
        """fp32 [B, D, H, W] each."""


def check_codes(bench: Bench, who: str, problem: Problem, find: Callable[[Tensor], Tensor]) -> None:
    """No code is nearer than the one found, beyond rounding.

    Args:
        bench: keeps the comparison.
        who: is checked.
        problem: what is searched.
        find: codes int64 [N] of rows [N, D].
    """
    rows = problem.sets[0].permute(0, 2, 3, 1).flatten(0, 2)[:SAMPLE]
    what = "largest d²(found) - d²(nearest) in fp64, relative to the square of the summed lengths, centred"
    limit = tie_margin(rows.shape[1]) if who.startswith("ours") else _OTHERS
    bench.check(f"{who}_codes", what, excess(rows, problem.codes, find(rows)), limit)


def excess(z: Tensor, codes: Tensor, found: Tensor) -> float:
    """The largest d²(found) - d²(nearest), relative to (|z - c| + |e - c|)², c being the codes' mean."""
    z, codes, found = z.double(), codes.double(), found.to(z.device)
    distance = torch.cdist(z, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    least, nearest = distance.min(dim=1)
    centre = codes.mean(dim=0)
    lengths = (codes - centre).norm(dim=1)
    size = ((z - centre).norm(dim=1) + torch.maximum(lengths[found], lengths[nearest])).square()
    return float(((distance.gather(1, found[:, None])[:, 0] - least) / size).max())


def check_statistics(bench: Bench, who: str, problem: Problem) -> None:
    """Counts are right, and sums are those of fp64 but for rounding."""
    rows, codes = problem.sets[0].permute(0, 2, 3, 1).flatten(0, 2), problem.codes
    found = assign(rows, codes, statistics=True)
    counts = torch.bincount(found.codes, minlength=len(codes))
    bench.check(f"{who}_counts", "largest difference of a count", float((found.counts - counts).abs().max()), 0)
    sums = torch.zeros_like(codes, dtype=torch.float64).index_add_(0, found.codes, rows.double())
    size = torch.zeros_like(sums).index_add_(0, found.codes, rows.double().abs()).clamp(min=1e-12)
    difference = float(((found.sums - sums).abs() / size).max())
    bench.check(
        f"{who}_sums", "largest difference of a sum to fp64, relative to the sum of absolute values", difference, _SUMS
    )
