"""The tokenizer without a network: the values of the pixels are the codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.models.tokenizer import CERTAIN, ImageTokenizer, silenced

_LUMINANCE = (19_595, 38_470, 7_471)  # of 65,536; ITU-R 601-2, rounded as Pillow does for its mode L


class RawPixels(ImageTokenizer):
    """Levels of 256 codes, each as large as the image: blue, green and red, or grey alone.

    Args:
        grey: whether there is one level, the luminance.
    """

    likelihood = CERTAIN

    def __init__(self, *, grey: bool = False) -> None:
        super().__init__()
        self.grey = grey

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Values int64 [B, S, S] of images [B, 3, S, S] in [-1, 1], of each colour."""
        red, green, blue = images.float().add(1).mul(127.5).round().clamp(0, 255).long().unbind(1)
        if not self.grey:
            return [blue, green, red]
        weighted = [value * weight for value, weight in zip((red, green, blue), _LUMINANCE, strict=True)]
        return [(sum(weighted, torch.full_like(red, 1 << 15))) >> 16]

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Images [B, 3, S, S] of values [B, S, S] a level: the inverse of `encode`, unless colours were made grey."""
        colours = [latents[0]] * 3 if self.grey else list(reversed(latents))
        return torch.stack(colours, dim=1).float() / 127.5 - 1

    @torch.no_grad()
    def decode_alone(self, latents: Sequence[Tensor], level: int) -> Tensor:
        """Images [B, 3, S, S] of one colour, the others at their mean."""
        return self.decode(silenced([own.float() for own in latents], level))

    def log_likelihood(self, images: Tensor, latents: Sequence[Tensor]) -> Tensor:
        """Log 1 = 0 for each image: its pixels are the codes."""
        return torch.zeros(len(images), device=images.device)

    def vectors(self) -> list[Tensor]:
        """The values themselves, [256, 1] a level."""
        return [torch.arange(256.0)[:, None]] * (1 if self.grey else 3)
