"""Dequantization: a probability of 8-bit images from a density over continuous ones.

With noise u in [0, 1]^D added to grey levels x, a density p has P(x) = integral of p(x + u) du (Theis et al. 2016,
section 3.1), and for any distribution q of the noise

    log P(x) >= E_q[log p(x + u) - log q(u | x)]

(Ho et al. 2019, Flow++, equation 12). Uniform noise has log q = 0, and is paid for where p is not flat inside of a bin.
Variational dequantization learns q, a flow that is told the image. It begins as uniform noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from vqscale.models.convnets import ResidualBlock, Stack
from vqscale.models.density import normal_nats
from vqscale.models.network import GridShape
from vqscale.models.realnvp import Coupling, kept_parts

HALF_RANGE = 128
"""Half of the 256 bins: what a unit of values in -1 to 1 is in grey levels."""


class Dequantizer(nn.Module, ABC):
    """Noise inside of the bins of grey levels."""

    @abstractmethod
    def forward(self, levels: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """Noise in [0, 1] of the shape of the levels, and -log q(u | x) [B] of it.

        Args:
            levels: grey levels 0 to 255 as floats, [B, channels, side, side].
            normals: of the same shape and dtype, from the standard normal distribution: all randomness.
        """


class UniformNoise(Dequantizer):
    """Every place in a bin equally likely; nothing is learned."""

    def forward(self, levels: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """The places of the numbers in their own distribution; 0 nats."""
        return torch.special.ndtr(normals), normals.new_zeros(len(normals))


class VariationalNoise(Dequantizer):
    """u = F(v), with v a RealNVP of the normal numbers that is told the image, and F the normal distribution function.

    Flow++ ends in a sigmoid; with F, couplings that are the identity give uniform noise.

    Args:
        channels: of the images.
        side: of the images.
        couplings: how many.
        width: channels of their networks.
        half_range: half of the number of grey levels.
    """

    def __init__(self, channels: int, side: int, *, couplings: int, width: int, half_range: float = HALF_RANGE) -> None:
        super().__init__()
        self.half_range = half_range
        self.look = Stack(nn.Conv2d(channels, width, 3, padding=1), ResidualBlock(width, width), nn.ReLU())
        parts = islice(cycle(kept_parts(GridShape(side, 0, channels))), couplings)
        self.couplings = nn.ModuleList(Coupling(kept, width) for kept in parts)

    def forward(self, levels: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """By the change of variables from the normal numbers over v to u."""
        context = self.look(levels / self.half_range - 1)
        v, log_determinant = normals, normals.new_zeros(len(normals))
        for coupling in self.couplings:
            v, more = coupling(v, context)
            log_determinant = log_determinant + more
        # -log q(u) = -log N(normals) + log |dv / d normals| + log |du / dv|, and du / dv is the normal density of v.
        density = (normal_nats(normals) - normal_nats(v)).flatten(1).sum(1)
        return torch.special.ndtr(v), density + log_determinant


def dequantized_nats(
    dequantizer: Dequantizer,
    nats: Callable[[Tensor], Tensor],
    levels: Tensor,
    normals: Tensor,
    half_range: float = HALF_RANGE,
) -> Tensor:
    """What on average is at least -log P(x) [B] of images of grey levels, by one draw of the noise.

    Args:
        dequantizer: the noise.
        nats: -log p(y) [B] of values y in [-1, 1], [B, channels, side, side]; a density there.
        levels: as for `Dequantizer.forward`.
        normals: as for `Dequantizer.forward`.
        half_range: half of the number of grey levels.
    """
    noise, noise_nats = dequantizer(levels, normals)
    volume = levels[0].numel() * math.log(half_range)  # a density over -1 to 1 is that over grey levels times 128
    return nats((levels + noise) / half_range - 1) + volume - noise_nats
