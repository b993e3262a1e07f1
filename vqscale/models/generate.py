"""How codes are drawn: truncation, guidance, and where the randomness of a sample comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


class Draws:
    """Draws the codes of a batch of samples.

    All randomness of a sample comes from its seed, so it depends neither on the batch nor on the number of ranks.

    Args:
        sampling: temperature, truncation, guidance.
        seeds: one a sample.
        device: of what is drawn.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        self.sampling, self._device = sampling, device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniforms(self, count: int) -> Tensor:
        """The next numbers in [0, 1) of each sample: float64 [B, count]."""
        numbers = [torch.rand(count, generator=generator, dtype=torch.float64) for generator in self._generators]
        return torch.stack(numbers).to(self._device)

    @property
    def guided(self) -> bool:
        """Whether logits without the class are needed too."""
        return self.sampling.guidance != 1.0

    def rows(self, classes: Tensor, no_class: int) -> Tensor:
        """The classes that logits are needed for: those of the samples, and as often none if they are guided."""
        return torch.cat([classes, torch.full_like(classes, no_class)]) if self.guided else classes

    def spread(self, samples: Tensor) -> Tensor:
        """What belongs to the samples [B, ...], for each of the `rows`."""
        return torch.cat([samples, samples]) if self.guided else samples

    def guide(self, logits: Tensor) -> Tensor:
        """Logits fp32 [B, ...] of the samples, from those of the `rows`."""
        if not self.guided:
            return logits.float()
        given, none = logits.float().chunk(2)
        return none + self.sampling.guidance * (given - none)

    def codes(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """As `draw`, by the sampling of this batch."""
        return draw(logits, uniform, self.sampling)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Codes int64 [B] by inverting the cumulative distribution of logits [B, K] at uniform numbers [B] in [0, 1).

    Truncation happens on sorted codes: top-k by rank, top-p by the probability of the codes before.
    """
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    sorted_p, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = sorted_p.cumsum(dim=-1) - sorted_p
    keep = before < sampling.top_p  # the likeliest code always stays: nothing lies before it
    if sampling.top_k:
        keep &= torch.arange(logits.shape[-1], device=logits.device) < sampling.top_k
    sorted_p = torch.where(keep, sorted_p, 0.0)
    cumulative = sorted_p.cumsum(dim=-1)
    target = (uniform.double() * cumulative[:, -1]).unsqueeze(1)
    rank = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    # Rounding may point behind the last kept code; step back onto it.
    rank = torch.minimum(rank, keep.sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, rank).squeeze(1)
