"""A variational autoencoder with Gaussian latents (Kingma & Welling 2014) on one or several levels.

The networks are those of the VQ-VAE-2 (`hierarchy`); in the place of a codebook, each level has a Gaussian posterior
and the prior N(0, 1). What a lower level is told of those above it are their means, not what was drawn of them. So,
given the image, the levels are independent, q(z | x) = Π_l N(z_l; μ_l(x), σ_l(x)): a posterior can be stored once and
drawn from later, and its divergence from the prior has a closed form on every level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqscale.models.convnets import Stack, Widths, doubling, trunk, trunk_width
from vqscale.models.density import normal_nats
from vqscale.models.gaussian import means_and_scales
from vqscale.models.hierarchy import Hierarchy, contexts, encoders, upsamplers
from vqscale.models.latents import draw
from vqscale.models.pixel_distributions import PixelDistribution
from vqscale.models.pixelcnn import GatedLayer
from vqscale.models.tokenizer import silenced

LEAST, MOST = -8.0, 4.0
"""Limits of a log scale: its square neither vanishes nor overflows beside the mean's."""


@dataclass(frozen=True)
class GaussianLevel:
    """A level's latents, and the networks around it."""

    channels: int
    """Of the latents."""
    factor: int
    """Downsampling against the level below it (level 0: the image); a power of two."""
    widths: Widths
    """Channels and depth of the networks."""


class Terms(NamedTuple):
    """What the bounds are made of; a tuple, since engines look for tensors inside of tuples only."""

    likelihood: Tensor
    """log p(x | z_k) in nats, fp32 [K, B]."""
    ratio: Tensor
    """log p(z_k) - log q(z_k | x) under the prior N(0, 1), in nats, fp32 [K, B]."""
    posteriors: list[Tensor]
    """fp32 [B, 2C, H, W] a level, level 0 first."""


class VAE(Hierarchy):
    """The tokenizer.

    Args:
        levels: level 0 (finest) first.
        pixels: distribution of pixels given the decoder's outputs.
    """

    continuous = True
    units = (Stack, GatedLayer)

    def __init__(self, levels: Sequence[GaussianLevel], pixels: PixelDistribution) -> None:
        super().__init__()
        self.levels, self.pixels, self.likelihood = tuple(levels), pixels, pixels.name
        dims = [level.channels for level in levels]
        above = [*dims[1:], 0]
        sizes = [(level.factor, level.widths) for level in levels]
        self.encoders = encoders(3, sizes)
        self.posteriors = nn.ModuleList(
            nn.Conv2d(level.widths.hidden + context, 2 * level.channels, 1)
            for level, context in zip(levels, above, strict=True)
        )
        self.contexts, self.upsamplers = contexts(dims, sizes), upsamplers(dims, sizes)
        self.decoder = trunk(sum(dims), *sizes[0])
        self.to_pixels = doubling(trunk_width(*sizes[0]), pixels.channels)

    def forward(self, images: Tensor, noise: Tensor) -> Terms:
        """Encode images, draw from their posteriors, and measure what was drawn.

        Args:
            images: [B, 3, S, S] of 256 grey levels, in [-1, 1].
            noise: standard normal, [B, K, values]: K draws of all levels, level 0 first.
        """
        posteriors = self._posteriors(images)
        found = [self._measured(images, posteriors, each) for each in noise.unbind(1)]
        likelihood, ratio = (torch.stack(part) for part in zip(*found, strict=True))
        return Terms(likelihood, ratio, posteriors)

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        """Posteriors fp32 [B, 2C, H, W] (`gaussian`) of images [B, 3, S, S], level 0 first."""
        return self._posteriors(images)

    @torch.no_grad()
    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Images [B, 3, S, S] of latents [B, C, H, W], level 0 first: the expected ones, or one that is drawn where
        pixels depend on each other.
        """
        return self.pixels.images(self._outputs(latents), latents)

    @torch.no_grad()
    def decode_alone(self, latents: Sequence[Tensor], level: int) -> Tensor:
        """Images [B, 3, S, S] of the latents of one level; as `ImageTokenizer`."""
        return self.decode(silenced(latents, level))

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, latents: Sequence[Tensor]) -> Tensor:
        """Log p(x | z) fp32 [B] in nats, as `ImageTokenizer`."""
        return self.pixels.log_likelihood(images, self._outputs(latents))

    def vectors(self) -> list[Tensor]:
        """None: there are no codes."""
        return []

    def _measured(self, images: Tensor, posteriors: Sequence[Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        drawn = draw(posteriors, noise)
        prior = [normal_nats(latents).flatten(1).sum(dim=1) for latents in drawn.latents]
        likelihood = self.pixels.log_likelihood(images, self._outputs(drawn.latents))
        return likelihood, -torch.stack(prior).sum(dim=0) - drawn.log_density

    def _posteriors(self, images: Tensor) -> list[Tensor]:
        found: list[Tensor] = []

        def mean(level: int, known: Tensor) -> Tensor:
            means, log_scales = means_and_scales(self.posteriors[level](known).float())
            found.insert(0, torch.cat([means, log_scales.clamp(LEAST, MOST)], dim=1))
            return means

        self.come_down(images, mean)
        return found

    def _outputs(self, latents: Sequence[Tensor]) -> Tensor:
        outputs: Tensor = self.to_pixels(self.features(latents))
        return outputs
