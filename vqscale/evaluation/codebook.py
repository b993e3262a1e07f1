"""What codes say of a codebook: how many are used, how evenly, and how far apart they lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1024  # codes that are compared with all others at once
_FARTHEST, _FINE = 4.0, 10  # the histogram's range in deviations; fine bins in each tenth of one
_BINS = round(_FARTHEST * 10) * _FINE
_RUNS = 64


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
    distance_median: float
    """Median distance of all pairs of codes, in the same unit and to a hundredth of it."""
    distances: list[float]
    """Share of the pairs whose distance lies in each tenth of the unit, from 0 on; the last has what is farther."""
    shares: list[float]
    """Share of all assignments that the codes take, the most frequent first; of a large codebook, sums over equal
    runs of codes."""

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
    nearest, pairs = _distances(vectors.double())
    return CodebookReport(
        codes=len(counts),
        used=int((counts > 0).sum()),
        entropy_bits=entropy_bits(counts),
        nearest_median=float(nearest.median()),
        nearest_least=float(nearest.min()),
        distance_median=_median(pairs),
        distances=[round(share, 6) for share in (pairs.view(-1, _FINE).sum(dim=1) / pairs.sum().clamp(min=1)).tolist()],
        shares=_shares(counts),
    )


def entropy_bits(counts: Tensor) -> float:
    """Entropy in bits of what was counted, of the frequencies themselves (which is less than that of their source)."""
    frequencies = counts.double() / counts.sum()
    return float(-torch.special.xlogy(frequencies, frequencies).sum() / math.log(2))


def _distances(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [K] to the nearest other code, and how many of all distances lie in each bin, float64 [_BINS].

    Distances are in units of the root mean square deviation from the mean code. They are computed some rows at a time,
    so that no matrix of all codes by all is made.
    """
    spread = (vectors - vectors.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    scaled = vectors / spread.clamp(min=torch.finfo(torch.float64).tiny)
    nearest, pairs = [], torch.zeros(_BINS, dtype=torch.float64)
    for first in range(0, len(scaled), _ROWS):
        # Exact, since the distance of equal codes has to be 0.
        part = torch.cdist(scaled[first : first + _ROWS], scaled, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(len(part))
        part[own, first + own] = math.inf
        nearest.append(part.min(dim=1).values)
        bins = (part[part.isfinite()] * _BINS / _FARTHEST).long().clamp(max=_BINS - 1)
        pairs += torch.bincount(bins, minlength=_BINS)
    return torch.cat(nearest), pairs


def _median(pairs: Tensor) -> float:
    """The middle of the bin in which half of the pairs are reached."""
    place = int(torch.searchsorted(pairs.cumsum(0), pairs.sum() / 2))
    return (min(place, _BINS - 1) + 0.5) * _FARTHEST / _BINS


def _shares(counts: Tensor) -> list[float]:
    """Frequencies of the codes in falling order, in at most `_RUNS` equal runs."""
    frequencies = (counts.double() / counts.sum()).sort(descending=True).values
    return [round(float(part.sum()), 6) for part in frequencies.tensor_split(min(_RUNS, len(counts)))]
