"""How codes are drawn: truncation, guidance, and where the randomness of a sample comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn from the logits."""

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k likeliest codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of codes with this probability."""
    guidance: float = 1.0
    """Scale of classifier-free guidance (Ho & Salimans 2022): logits_none + scale · (logits_class - logits_none)."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the scale rises from 1 at a sequence's first code to `guidance` at its last; `constant` has it everywhere."""

    @property
    def guided(self) -> bool:
        """Whether logits without the class are needed too."""
        return self.guidance != 1.0

    def scales(self, length: int) -> Tensor:
        """Scale of guidance at each of `length` positions, fp32."""
        share = torch.linspace(0, 1, length, dtype=torch.float64)
        if self.guidance_schedule == "constant":
            share = torch.ones_like(share)
        elif self.guidance_schedule == "cosine":
            share = (1 - torch.cos(math.pi * share)) / 2
        return (1 + (self.guidance - 1) * share).float()


LOGIT_BYTES = 48
"""What drawing takes a logit at its peak: as it is computed and in fp32, and in fp64 before and behind the softmax,
sorted and added up."""


class Draws:
    """Draws the codes of a batch of samples.

    All randomness of a sample comes from its seed, so it depends neither on the batch nor on the number of ranks.

    Args:
        sampling: temperature, truncation, guidance.
        seeds: one a sample.
        device: of what is drawn.
        dtype: in which networks multiply, and keep what they look at again; None: that of their weights.
    """

    def __init__(
        self, sampling: Sampling, seeds: Sequence[int], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self.sampling, self.dtype, self._device = sampling, dtype, device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniforms(self, count: int) -> Tensor:
        """The next numbers in [0, 1) of each sample: float64 [B, count]."""
        numbers = [torch.rand(count, generator=generator, dtype=torch.float64) for generator in self._generators]
        return torch.stack(numbers).to(self._device)

    def normals(self, count: int) -> Tensor:
        """The next numbers of each sample from the standard normal distribution: float64 [B, count]."""
        numbers = [torch.randn(count, generator=generator, dtype=torch.float64) for generator in self._generators]
        return torch.stack(numbers).to(self._device)

    @property
    def guided(self) -> bool:
        """As `Sampling.guided`."""
        return self.sampling.guided

    def rows(self, classes: Tensor, no_class: int) -> Tensor:
        """The classes that logits are needed for: those of the samples, and as often none if they are guided."""
        return torch.cat([classes, torch.full_like(classes, no_class)]) if self.guided else classes

    def spread(self, samples: Tensor) -> Tensor:
        """What belongs to the samples [B, ...], for each of the `rows`."""
        return torch.cat([samples, samples]) if self.guided else samples

    def guide(self, logits: Tensor, scale: Tensor | None = None) -> Tensor:
        """Logits fp32 [B, ...] of the samples, from those of the `rows`.

        Args:
            logits: [rows, ...].
            scale: of the guidance, broadcast to the logits; one of `Sampling.scales`. None: `guidance`.
        """
        if not self.guided:
            return logits.float()
        given, none = logits.float().chunk(2)
        return none + (self.sampling.guidance if scale is None else scale) * (given - none)

    def codes(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """As `draw`, by the sampling of this batch."""
        return draw(logits, uniform, self.sampling)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Codes int64 [B] by inverting the cumulative distribution of logits [B, K] at uniform numbers [B] in [0, 1).

    Truncation happens on sorted codes: top-k by rank, top-p by the probability of the codes before. Nothing is sorted
    without it.
    """
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    order, kept = _truncated(probabilities, sampling)
    cumulative = kept.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    rank = torch.searchsorted(cumulative, uniform.double()[:, None] * total, right=True)
    # Rounding may point behind the last code that was kept; step back onto it.
    rank = torch.minimum(rank, torch.searchsorted(cumulative, total))
    return (rank if order is None else order.gather(1, rank)).squeeze(1)


def _truncated(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor | None, Tensor]:
    """Codes in the order in which they stand (None: their own), and their probabilities, 0 where they are left out."""
    if sampling.top_p < 1:
        kept, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = kept.cumsum(dim=-1) - kept
        kept = kept.masked_fill(before >= sampling.top_p, 0.0)  # the likeliest stays: nothing lies before it
        return order, kept[:, : sampling.top_k] if sampling.top_k else kept
    if 0 < sampling.top_k < probabilities.shape[-1]:
        kept, order = probabilities.topk(sampling.top_k, dim=-1)
        return order, kept
    return None, probabilities
