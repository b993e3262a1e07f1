"""What each level of Gaussian latents carries: its divergence from the prior, and its active units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.models.gaussian import kl_to_normal, means_and_scales
from vqscale.models.quantizer import SumOverRanks

ACTIVE_ABOVE = 0.01
"""A unit is active when the variance of its posterior's mean over images is above this (Burda et al. 2016, 5.2)."""


def divergence(posterior: Tensor) -> Tensor:
    """KL(q(z | x) || N(0, 1)) in nats, [B, C], of a posterior [B, 2C, H, W]: each channel's, summed over the cells."""
    return kl_to_normal(posterior).flatten(2).sum(dim=2)


class LatentWatch:
    """Sums over images; `see` on each rank, then `meet` once.

    Args:
        names: of the levels.
        shapes: channels and side of each.
        device: where the sums are kept.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._names, self._sizes = list(names), [channels * side**2 for channels, side in shapes]
        self._channels = [channels for channels, _ in shapes]
        # Images; then of every unit the sums of its mean and its square, and of every channel that of its divergence.
        self._sums = torch.zeros(1 + 2 * sum(self._sizes) + sum(self._channels), dtype=torch.float64, device=device)

    def forget(self) -> None:
        """Begin anew."""
        self._sums.zero_()

    @torch.no_grad()
    def see(self, posteriors: Sequence[Tensor]) -> None:
        """Take in the posteriors [B, 2C, H, W] of some images."""
        means = torch.cat([means_and_scales(own)[0].flatten(1) for own in posteriors], dim=1).double()
        divergences = torch.cat([divergence(own) for own in posteriors], dim=1).double()
        count = self._sums.new_full((1,), len(means))
        self._sums += torch.cat([count, means.sum(0), means.square().sum(0), divergences.sum(0)])

    def meet(self, sum_over_ranks: SumOverRanks) -> None:
        """Add what all ranks saw; one all-reduce."""
        self._sums = sum_over_ranks(self._sums)

    def divergences(self) -> list[Tensor]:
        """fp32 [C] a level: mean divergence of each channel in nats an image."""
        means = self._sums[-sum(self._channels) :] / self._sums[0]
        return list(means.float().split(self._channels))

    def figures(self) -> dict[str, dict[str, float]]:
        """By level name: `kl`, nats an image, and `active`, the share of its units that are; none without images."""
        if not self._sums[0]:
            return {}
        units = sum(self._sizes)
        means, squares = self._sums[1 : 1 + 2 * units].view(2, units) / self._sums[0]
        active = (squares - means.square() > ACTIVE_ABOVE).double().split(self._sizes)
        levels = zip(self._names, self.divergences(), active, strict=True)
        return {name: {"kl": float(own.sum()), "active": float(part.mean())} for name, own, part in levels}
