"""What codes say of a codebook: how many are used, how evenly, and how far apart they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CodebookReport:
    """One level, over a data set."""

    codes: int
    """Size of the codebook."""
    used: int
    """Codes that occur."""
    entropy_bits: float
    """Of a code drawn from anywhere in the data; `log2(codes)` where all are equally frequent."""
    nearest_median: float
    """Median distance from a code to the code next to it, in units of the codebook's root mean square deviation."""
    nearest_least: float
    """The least of them; 0 says that two codes are the same."""

    @property
    def usage(self) -> float:
        """Share of the codes that occur."""
        return self.used / self.codes

    @property
    def perplexity(self) -> float:
        """2 to the entropy: so many equally frequent codes would be as varied."""
        return float(2**self.entropy_bits)


def report_codebook(counts: Tensor, vectors: Tensor) -> CodebookReport:
    """Describe a codebook.

    Args:
        counts: int64 [K], how often each code occurs, over all ranks.
        vectors: fp32 [K, D].

    Raises:
        ValueError: no code occurs.
    """
    total = int(counts.sum())
    if not total:
        raise ValueError("no codes were counted")
    nearest = _nearest(vectors.double())
    return CodebookReport(
        codes=len(counts),
        used=int((counts > 0).sum()),
        entropy_bits=entropy_bits(counts),
        nearest_median=float(nearest.median()),
        nearest_least=float(nearest.min()),
    )


def entropy_bits(counts: Tensor) -> float:
    """Entropy in bits of what was counted, of the frequencies themselves (which is less than that of their source)."""
    frequencies = counts.double() / counts.sum()
    return float(-torch.special.xlogy(frequencies, frequencies).sum() / math.log(2))


def _nearest(vectors: Tensor) -> Tensor:
    """Distance [K] to the nearest other code, in units of the root mean square deviation from the mean code."""
    spread = (vectors - vectors.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    distances = torch.cdist(vectors, vectors)
    distances.fill_diagonal_(math.inf)
    return distances.min(dim=1).values / spread.clamp(min=torch.finfo(torch.float64).tiny)
