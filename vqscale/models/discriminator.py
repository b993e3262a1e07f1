"""A discriminator of patches (PatchGAN; Isola et al. 2017, section 3.2.2 and appendix 6.1.2)."""

from __future__ import annotations

import math

from torch import Tensor, nn

_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Strided 4×4 convolutions; a logit says of one patch whether it is real.

    Layers, widths and initialisation are pix2pix's, as VQGAN takes them (Esser et al. 2021). Group normalisation
    (Wu & He 2018) stands in the place of their batch normalisation, whose statistics would depend on how the batch is
    spread over the ranks.

    Args:
        width: channels of the first layer; doubled by each further one, up to eight times.
        layers: halvings. A logit sees 16, 34, 70, 142 pixels for 1, 2, 3, 4 of them.
        channels: of the images.
    """

    def __init__(self, width: int = 64, layers: int = 3, channels: int = 3) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        inside = width
        for number in range(1, layers + 1):
            out = width * min(2**number, 8)
            stride = 1 if number == layers else 2
            body += [
                nn.Conv2d(inside, out, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(_GROUPS, out // 2), out),  # two channels or more a group
                nn.LeakyReLU(0.2, inplace=True),
            ]
            inside = out
        self.layers = nn.Sequential(*body, nn.Conv2d(inside, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 1, h, w] of images [B, 3, S, S] in [-1, 1]; h = w = S / 2^layers - 2."""
        logits: Tensor = self.layers(images)
        return logits
