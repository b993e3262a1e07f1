"""Variants of the codebook: learned by gradients, on the unit sphere, first set by k-means.

All of them keep the codebook a set of fp32 buffers that one update moves, from statistics over the global batch. So
what holds of the EMA codebook holds of these: the forward is pure, accumulation and skipped steps change nothing, all
ranks stay equal, and no strategy that shards or casts parameters can touch the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.models.quantizer import Codebook, Donors


class GradientCodebook(Codebook):
    """Codes that Adam moves down the codebook loss (van den Oord et al. 2017, equation 3, second term).

    The loss is mean |sg[z] - e|² over the global batch. Its gradient with respect to a code is a function of what is
    summed over the ranks anyway, 2 (count · e - sum) / (N · D), and no other term of equation 3 reaches the codes. So
    neither autograd nor the engine's optimizer is needed: the codes stay buffers, and Adam (Kingma & Ba 2015) with its
    moments runs here, the same on every rank. It differs from an optimizer over all parameters in this: clipping the
    gradient norm leaves the codes out, and so does weight decay.

    Counts are the EMA of the use of each code, which restarts go by. A restarted code begins with fresh moments.

    Args:
        size: K.
        dim: D.
        betas: Adam's decay rates of the two moments.
        options: as for `Codebook`.
    """

    first: Tensor
    second: Tensor
    ages: Tensor

    def __init__(self, size: int, dim: int, *, betas: tuple[float, float] = (0.9, 0.999), **options: Any) -> None:
        super().__init__(size, dim, **options)
        self.betas = betas
        self.register_buffer("first", torch.zeros(size, dim))
        self.register_buffer("second", torch.zeros(size, dim))
        self.register_buffer("ages", torch.zeros(size))

    @torch.no_grad()
    def initialise(self, vectors: Tensor, expected: float) -> None:
        """As `Codebook.initialise`, with fresh moments."""
        super().initialise(vectors, expected)
        for state in (self.first, self.second, self.ages):
            state.zero_()

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, donors: Tensor, decay: float, rate: float = 0.0) -> Tensor:
        """One step of Adam with learning rate `rate`, then restart dead codes; arguments as for `Codebook.update`."""
        self.counts.lerp_(counts, 1 - decay)
        self._descend(self.gradient(counts, sums), rate)
        self.sums.copy_(self.codes * self.counts[:, None])
        return self._restart(donors, counts.sum() / len(counts))

    def gradient(self, counts: Tensor, sums: Tensor) -> Tensor:
        """fp32 [K, D]: of the mean squared distance between the latents (constant) and their codes."""
        return (counts[:, None] * self.codes - sums) * (2 / (counts.sum() * self.codes.shape[1]))

    def _descend(self, gradient: Tensor, rate: float) -> None:
        first, second = self.betas
        self.ages += 1
        self.first.lerp_(gradient, 1 - first)
        self.second.lerp_(gradient.square(), 1 - second)
        size = (self.second / (1 - second**self.ages)[:, None]).sqrt() + 1e-8
        self._place(self.codes - rate * self.first / (1 - first**self.ages)[:, None] / size)

    def _reset(self, places: Tensor, dead: Tensor, donors: Tensor, expected: Tensor) -> None:
        super()._reset(places, dead, donors, expected)
        for state in (self.first, self.second, self.ages):
            kept = ~dead.view(-1, *[1] * (state.dim() - 1))
            state[places] = state[places] * kept


class UnitCodebook(Codebook):
    """Codes of length one, for latents of length one: the nearest code is then the one of the largest cosine.

    L2-normalised codes as in ViT-VQGAN (Yu et al. 2022, section 3.2). The network normalises the latents; the EMA is
    that of spherical k-means, a mean that is normalised.
    """

    def __init__(self, size: int, dim: int, **options: Any) -> None:
        super().__init__(size, dim, **options)
        self.codes.copy_(F.normalize(self.codes))
        self.sums.copy_(self.codes)

    def _place(self, vectors: Tensor) -> None:
        super()._place(F.normalize(vectors))


class UnitGradientCodebook(UnitCodebook, GradientCodebook):
    """Codes of length one that Adam moves: the gradient's part along a code is left out, since it has no effect."""

    def gradient(self, counts: Tensor, sums: Tensor) -> Tensor:
        """fp32 [K, D]: the codebook loss's gradient through the normalisation of the codes."""
        full = super().gradient(counts, sums)
        return full - (full * self.codes).sum(dim=1, keepdim=True) * self.codes


@torch.no_grad()
def lloyd(
    book: Codebook,
    latents: Tensor,
    donors: Donors,
    level: int,
    iterations: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> None:
    """Move a codebook to the k-means centres of the global batch (Lloyd 1982), one all-reduce an iteration.

    Args:
        book: its codes are where the iterations begin.
        latents: this rank's [B, D, H, W].
        donors: the step's draw.
        level: number of the level.
        iterations: how many.
        sum_over_ranks: the all-reduce.
    """
    for _ in range(iterations):
        seen = book(latents, donors, level).statistics
        total = sum_over_ranks(torch.cat([seen.counts[:, None], seen.sums], dim=1))
        counts, sums = total[:, :1], total[:, 1:]
        # A centre that no latent is nearest to stays; it is restarted in training.
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), book.codes)
        book.initialise(centres, float(counts.sum()) / len(counts))
