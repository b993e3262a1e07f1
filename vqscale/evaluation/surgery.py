"""ELBO surgery for discrete latents: where the bits of the codes go (Hoffman & Johnson 2016).

For an encoder that gives each image one grid of codes, the KL term of the bound is the code length E[-log p(z)]. Over N
images it falls into the mutual information between image and codes, which is the entropy H(q) of the aggregated
posterior q(z) (at most log N), and KL(q || p), what the prior has not learned of q. A prior that is given the class is
compared with q(z | class), class by class. Position by position, without what
neighbours tell of each other, the same falls into entropies and KL divergences that can be counted directly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.evaluation.codebook import entropy_bits


class PositionCounts:
    """How often each code stands at each position of one level's grid.

    Args:
        side: of the grid.
        codes: size of the codebook.
    """

    def __init__(self, side: int, codes: int) -> None:
        self.counts = torch.zeros(side * side, codes, dtype=torch.int64)
        """[side², K]. Add those of all ranks."""

    def add(self, grids: Tensor) -> None:
        """Grids int64 [n, side, side]."""
        flat, size = grids.flatten(1), self.counts.shape[1]
        places = torch.arange(flat.shape[1]) * size + flat.long()
        self.counts += torch.bincount(places.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    @property
    def of_codes(self) -> Tensor:
        """[K], over all positions."""
        return self.counts.sum(dim=0)


@dataclass(frozen=True)
class Surgery:
    """Bits an image. The first three add up to the code length under the uniform prior, T log2 K."""

    uniform: float
    """Code length under the uniform prior: T log2 K over all levels."""
    unused: float
    """KL of the codebooks' overall frequencies to uniform: codes that are rare or dead, wherever they stand."""
    placed: float
    """Mutual information of code and position: that a place prefers some codes."""
    positions: float
    """Entropy left at the positions, each for itself: an upper bound of the aggregated posterior's entropy."""
    mutual_information: float
    """Between image and codes: the entropy of the grids that were seen, log2 N where all N differ."""
    information_given_class: float
    """The same where the class is known already: the mean over the classes of the entropy within each."""

    @property
    def divergence_uniform(self) -> float:
        """KL of the aggregated posterior over these images to the uniform prior."""
        return self.uniform - self.mutual_information


def dissect(levels: list[PositionCounts], grids: Mapping[tuple[int, str], int]) -> Surgery:
    """Take the code length apart.

    Args:
        levels: counts of each level, over all ranks.
        grids: how often each set of grids, by a hash of it, occurred with each class, over all ranks.

    Raises:
        ValueError: there are no images.
    """
    if not grids:
        raise ValueError("no images were counted")
    uniform = sum(len(level.counts) * math.log2(level.counts.shape[1]) for level in levels)
    overall = sum(len(level.counts) * entropy_bits(level.of_codes) for level in levels)
    positions = sum(_entropies(level.counts) for level in levels)
    classes, codes = _sums(grids, 0), _sums(grids, 1)
    return Surgery(
        uniform=uniform,
        unused=uniform - overall,
        placed=overall - positions,
        positions=positions,
        mutual_information=entropy_bits(codes),
        information_given_class=entropy_bits(torch.tensor(list(grids.values()))) - entropy_bits(classes),
    )


def _sums(grids: Mapping[tuple[int, str], int], part: int) -> Tensor:
    """Counts by one part of the keys."""
    found: Counter[int | str] = Counter()
    for key, count in grids.items():
        found[key[part]] += count
    return torch.tensor(list(found.values()))


def _entropies(counts: Tensor) -> float:
    """Sum of the positions' entropies in bits."""
    frequencies = counts.double() / counts.sum(dim=1, keepdim=True)
    return float(-torch.special.xlogy(frequencies, frequencies).sum() / math.log(2))
