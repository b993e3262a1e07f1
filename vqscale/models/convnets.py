"""Convolutional encoders and decoders of the tokenizer.

What Razavi et al. (2019, section 3.1 and appendix) leave open follows github.com/rosinality/vq-vae-2-pytorch, whose
two-level network these make layer for layer: the first halving has half the width, kernels of halvings and doublings
are 4×4, residual blocks stand at the level's own grid, and a residual branch begins with its ReLU.

Nothing works in place: what it would overwrite is freed at once anyway, and on the CPU torch's in-place operations take
twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


class Stack(nn.Sequential):
    """A sequence of layers that is sharded, recomputed and compiled as one (`Hierarchy.units`)."""


class ResidualBlock(nn.Module):
    """ReLU, 3×3 convolution, ReLU, 1×1 convolution, added to the input."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, inner, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return x + self.layers(x)


@dataclass(frozen=True)
class Widths:
    """Channels and depth of the encoder and the decoders of one level."""

    hidden: int
    residual_blocks: int
    residual_hidden: int

    def residuals(self) -> list[nn.Module]:
        """The residual blocks of one encoder or decoder, with the ReLU behind them."""
        blocks = [ResidualBlock(self.hidden, self.residual_hidden) for _ in range(self.residual_blocks)]
        return [*blocks, nn.ReLU()]


def encoder(channels: int, factor: int, widths: Widths) -> Stack:
    """[B, channels, H, W] to [B, hidden, H/factor, W/factor] by strided convolutions and residual blocks."""
    layers: list[nn.Module] = []
    for step in range(doublings(factor)):
        out = widths.hidden if step else widths.hidden // 2
        layers += [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.ReLU()]
        channels = out
    return Stack(*layers, nn.Conv2d(channels, widths.hidden, 3, padding=1), *widths.residuals())


def trunk(channels: int, factor: int, widths: Widths) -> Stack:
    """All of a decoder but its last doubling: [B, channels, H, W] to [B, `trunk_width`, factor·H/2, factor·W/2]."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths.hidden, 3, padding=1), *widths.residuals()]
    inside = widths.hidden
    for _ in range(doublings(factor) - 1):
        layers += [doubling(inside, widths.hidden // 2), nn.ReLU()]
        inside = widths.hidden // 2
    return Stack(*layers)


def trunk_width(factor: int, widths: Widths) -> int:
    """Channels that `trunk` ends with."""
    return widths.hidden if doublings(factor) == 1 else widths.hidden // 2


def decoder(channels: int, out: int, factor: int, widths: Widths) -> Stack:
    """[B, channels, H, W] to [B, out, factor·H, factor·W], the mirror image of `encoder`."""
    return Stack(*trunk(channels, factor, widths), doubling(trunk_width(factor, widths), out))


def upsampler(channels: int, factor: int) -> Stack:
    """[B, channels, H, W] to [B, channels, factor·H, factor·W] by transposed convolutions alone."""
    return Stack(*(doubling(channels, channels) for _ in range(doublings(factor))))


class Doubling(nn.ConvTranspose2d):
    """The transposed convolution that doubles height and width."""

    bias: nn.Parameter

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 4, stride=2, padding=1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[B, C, H, W] to [B, out, 2H, 2W]."""
        doubled = F.conv_transpose2d(x, self.weight, stride=2, padding=1)
        # Added here: inside the layer, torch takes twice as long for a bias' gradient on the CPU as for all the rest.
        return doubled + self.bias.to(doubled.dtype)[:, None, None]


def doubling(channels: int, out: int) -> Doubling:
    """The transposed convolution that doubles height and width."""
    return Doubling(channels, out)


def doublings(factor: int) -> int:
    """How often two is in `factor`, a power of two."""
    return factor.bit_length() - 1
