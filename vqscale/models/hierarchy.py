"""What hierarchies of levels have in common, whatever a level's latents are: encoders up, decoders down.

    image → E_0 → E_1 → … → E_top
                             latents of the top → C_top → … → latents of level 0
    decoder(level 0, U_1(level 1, U_2(level 2, …))) → image

`C_l` turns the latents of level l and the context from above it into the context of level l-1, on its grid: the lower
level is left the details that the upper ones do not hold (Razavi et al. 2019, algorithm 1). `U_l` is a transposed
convolution that brings the latents of level l and all above it to the grid of level l-1, since the decoder sees all
levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqscale.models.convnets import Stack, Widths, decoder, encoder, upsampler
from vqscale.models.tokenizer import ImageTokenizer

Treatment = Callable[[int, Tensor], Tensor]
"""From what is known of a level to what the networks see of its latents: (level, [B, C, H, W]) → [B, dim, H, W]."""


class Hierarchy(ImageTokenizer):
    """The networks around the latents."""

    units: ClassVar[tuple[type[nn.Module], ...]] = (Stack,)
    encoders: nn.ModuleList
    contexts: nn.ModuleList
    """Item l belongs to level l + 1: it makes something for level l. So it is with the next."""
    upsamplers: nn.ModuleList
    decoder: nn.Module

    def come_down(self, images: Tensor, treat: Treatment) -> list[Tensor]:
        """Encode, then treat each level from the top down; what comes of them, level 0 first."""
        hidden = []
        for encode in self.encoders:
            images = encode(images)
            hidden.append(images)
        levels: list[Tensor] = []
        context: Tensor | None = None
        for level in reversed(range(len(hidden))):
            levels.insert(0, treat(level, joined(hidden[level], context)))
            if level:
                context = self.contexts[level - 1](joined(levels[0], context))
        return levels

    def features(self, levels: Sequence[Tensor]) -> Tensor:
        """What the last layer makes the images from: [B, C, S/2, S/2]."""
        above: Tensor | None = None
        for level in reversed(range(1, len(levels))):
            above = self.upsamplers[level - 1](joined(levels[level], above))
        found: Tensor = self.decoder(joined(levels[0], above))
        return found


def encoders(channels: int, shapes: Sequence[tuple[int, Widths]]) -> nn.ModuleList:
    """An encoder a level, each over the one below it; `shapes` are factors and widths."""
    below = [channels, *(widths.hidden for _, widths in shapes)]
    each = zip(below, shapes, strict=False)
    return nn.ModuleList(encoder(inputs, factor, widths) for inputs, (factor, widths) in each)


def contexts(dims: Sequence[int], shapes: Sequence[tuple[int, Widths]]) -> nn.ModuleList:
    """What tells a level of those above it; `dims` are the channels that the networks see of each level's latents."""
    above = [*dims[1:], 0]  # channels of the context that a level is given
    levels = range(1, len(shapes))
    return nn.ModuleList(decoder(dims[level] + above[level], dims[level], *shapes[level]) for level in levels)


def upsamplers(dims: Sequence[int], shapes: Sequence[tuple[int, Widths]]) -> nn.ModuleList:
    """What brings a level and all above it to the grid below; arguments as for `contexts`."""
    return nn.ModuleList(upsampler(sum(dims[level:]), shapes[level][0]) for level in range(1, len(shapes)))


def joined(own: Tensor, above: Tensor | None) -> Tensor:
    """Channels of a level, and what is known from above it."""
    return own if above is None else torch.cat([own, above], dim=1)
