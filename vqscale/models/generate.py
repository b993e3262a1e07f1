"""Drawing code grids from a prior: one position after the other, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.models.transformer import Transformer


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


@torch.no_grad()
def generate(prior: Transformer, classes: Tensor, seeds: Sequence[int], sampling: Sampling) -> list[Tensor]:
    """Draw one set of code grids a class entry.

    Args:
        prior: the network, in evaluation mode.
        classes: int64 [B].
        seeds: one a sample. All randomness of a sample comes from its seed, so it depends neither on the batch
            nor on the number of ranks.
        sampling: temperature, truncation, guidance.

    Returns:
        int64 [B, side, side] a level, the coarsest first.
    """
    batch, device = len(classes), classes.device
    guided = sampling.guidance != 1.0
    rows = torch.cat([classes, torch.full_like(classes, prior.no_class)]) if guided else classes
    uniforms = torch.stack([_uniforms(seed, prior.length) for seed in seeds]).to(device)
    flat = [torch.zeros(len(rows), length, dtype=torch.int64, device=device) for length in prior.lengths]
    caches = prior.caches(len(rows), prior.class_token.weight)
    for position in range(prior.length):
        logits = prior.step(position, rows, flat, caches).float()
        if guided:
            given, none = logits[:batch], logits[batch:]
            logits = none + sampling.guidance * (given - none)
        drawn = draw(logits, uniforms[:, position], sampling)
        level, cell = prior.locate(position)
        flat[level][:, cell] = torch.cat([drawn, drawn]) if guided else drawn
    return [codes[:batch].view(batch, grid.side, grid.side) for codes, grid in zip(flat, prior.grids, strict=True)]


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


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
