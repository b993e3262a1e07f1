"""An autoregressive decoder: pixels given latents and the pixels before them (PixelVAE, Gulrajani et al. 2017).

The decoder's last layer tells every pixel of a gated PixelCNN what it knows of the image; what is left is a mixture of
logistic distributions for each pixel. So latents need not hold what neighbours tell of each other, and with a strong
network they may come to hold nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.noise import uniforms_of
from vqscale.models.pixel_distributions import MixturePixels, PixelDistribution
from vqscale.models.pixelcnn import GatedLayer, PixelSteps

_UNIFORMS = 4  # of a pixel: which component, and one a colour


class AutoregressivePixels(PixelDistribution):
    """p(x | z) = Π p(x_i | x_<i, z), in raster order.

    Args:
        components: of the mixture of each pixel.
        layers: gated layers. Each widens what a pixel sees by half a kernel.
        width: channels.
        kernel: side of the kernels, odd.
    """

    name = "autoregressive"

    def __init__(self, components: int, layers: int, width: int, kernel: int) -> None:
        super().__init__()
        self.channels, self.mixture = width, MixturePixels(components)
        self.tokens = nn.Linear(3, width)
        self.layers = nn.ModuleList(GatedLayer(width, kernel, 0.0) for _ in range(layers))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, self.mixture.channels, 1)
        )

    def log_likelihood(self, images: Tensor, outputs: Tensor) -> Tensor:
        """As `PixelDistribution`; all pixels at once."""
        return self.mixture.log_likelihood(images, self.parameters_of(images, outputs))

    def parameters_of(self, images: Tensor, outputs: Tensor) -> Tensor:
        """The mixture of each pixel [B, 10M, S, S], given images [B, 3, S, S] before it and what is told of it."""
        vertical = self.tokens(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        horizontal = F.pad(vertical, (1, 0, 0, 0))[..., :-1]
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, outputs)
        found: Tensor = self.head(horizontal)
        return found

    @torch.no_grad()
    def images(self, outputs: Tensor, latents: Sequence[Tensor]) -> Tensor:
        """One image of each, drawn pixel by pixel: its randomness follows from the latents' bytes."""
        batch, _, side, _ = outputs.shape
        uniforms = uniforms_of(latents[-1].cpu().numpy(), _UNIFORMS * side**2).to(outputs.device)
        uniforms = uniforms.view(batch, side, side, _UNIFORMS)
        steps, drawn = PixelSteps(self, outputs.float()), outputs.new_zeros(batch, side, side, 3, dtype=torch.float32)
        for y in range(side):
            steps.begin_row(y, drawn[:, y - 1])
            for x in range(side):
                mixture = steps.logits(x, drawn[:, y, x - 1])
                drawn[:, y, x] = self.mixture.draw(mixture, uniforms[:, y, x])
        return drawn.permute(0, 3, 1, 2)
