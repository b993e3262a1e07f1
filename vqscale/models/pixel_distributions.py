"""Distributions of the 256 levels of each colour of a pixel, given what a decoder says of it.

All of them are cut into levels: a level has the probability of the interval of one grey level around it, and the
levels 0 and 255 have the tails, so that the 256 add up to one (Salimans et al. 2017, section 2.1). So what is trained
on is what is reported, and no density can grow without bound over values that are whole numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Family = Literal["logistic", "gaussian"]

_FIRST_SCALE = 32.0  # grey levels: about as far as images lie from their mean
_NARROWEST = -7.0  # of a logarithm of a scale, in units of half the range of the colours (PixelCNN++)
_LEAST = 1e-7  # between two cumulative probabilities, relative


def log_probability(family: Family, values: Tensor, means: Tensor, scale: Tensor) -> Tensor:
    """Log of the probability of grey levels 0 to 255; of any shapes that broadcast. Gradients are finite everywhere."""
    log_cumulative = F.logsigmoid if family == "logistic" else torch.special.log_ndtr
    low, high = (values - 0.5 - means) / scale, (values + 0.5 - means) / scale
    tail = log_cumulative(torch.where(values <= 0, high, -low))
    # Both distributions are symmetric; in the left tail differences are exact.
    flipped = low + high > 0
    low, high = torch.where(flipped, -high, low), torch.where(flipped, -low, high)
    upper, lower = log_cumulative(high), log_cumulative(low)
    inside = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-_LEAST)))
    return torch.where((values <= 0) | (values >= 255), tail, inside)


class PixelDistribution(nn.Module, ABC):
    """p(x | z), by what the last layer of a decoder gives for each pixel."""

    name: ClassVar[str]
    """In reports."""
    channels: int
    """Channels of the last layer."""

    @abstractmethod
    def log_likelihood(self, images: Tensor, outputs: Tensor) -> Tensor:
        """Nats fp32 [B] of images [B, 3, S, S] in [-1, 1] given a decoder's outputs [B, channels, S, S]."""

    @abstractmethod
    def images(self, outputs: Tensor, latents: Sequence[Tensor]) -> Tensor:
        """Images [B, 3, S, S] that stand for latents (a level each, level 0 first), about -1 to 1; the expected ones,
        if the kind does not say otherwise.
        """


class GaussianPixels(PixelDistribution):
    """Every value by itself, normal around what the decoder gives.

    Args:
        scale: standard deviation in grey levels; None learns one for each colour.
    """

    name = "gaussian"
    channels = 3
    log_scale: Tensor

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        first = torch.full((3, 1, 1), math.log(scale or _FIRST_SCALE))
        if scale is None:
            self.log_scale = nn.Parameter(first)
        else:
            self.register_buffer("log_scale", first, persistent=False)

    def log_likelihood(self, images: Tensor, outputs: Tensor) -> Tensor:
        """As `PixelDistribution`."""
        levels, centres = _grey_levels(images.float()).round(), _grey_levels(outputs.float())
        return log_probability("gaussian", levels, centres, self.log_scale.exp()).flatten(1).sum(dim=1)

    def images(self, outputs: Tensor, latents: Sequence[Tensor]) -> Tensor:
        """The outputs themselves."""
        return outputs.float()


class MixturePixels(PixelDistribution):
    """A mixture of logistic distributions for each pixel (PixelCNN++, Salimans et al. 2017, section 2.2).

    All colours share the choice of the component. Within one, the means of green and blue are shifted in proportion to
    the colours before them.

    Args:
        components: of the mixture.
    """

    name = "mixture"

    def __init__(self, components: int) -> None:
        super().__init__()
        self.components, self.channels = components, 10 * components

    def log_likelihood(self, images: Tensor, outputs: Tensor) -> Tensor:
        """As `PixelDistribution`."""
        weights, means, log_scales, shifts = self._parts(outputs)
        x = images.float()[:, None]  # [B, 1, 3, S, S]
        centres = _shifted(means, shifts, x[:, :, 0], x[:, :, 1])
        found = log_probability(
            "logistic", _grey_levels(x).round(), _grey_levels(centres), log_scales.exp() * 127.5
        ).sum(dim=2)
        return torch.logsumexp(weights + found, dim=1).flatten(1).sum(dim=1)

    def images(self, outputs: Tensor, latents: Sequence[Tensor]) -> Tensor:
        """Of each component the means with the means of the colours before, averaged by the weights."""
        weights, means, _, shifts = self._parts(outputs)
        red = means[:, :, 0]
        green = means[:, :, 1] + shifts[:, :, 0] * red
        centres = _shifted(means, shifts, red, green)
        return (weights.exp()[:, :, None] * centres).sum(dim=1).clamp(-1, 1)

    def draw(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        """Colours [B, 3] of one pixel each, on the grey levels in [-1, 1].

        Args:
            outputs: [B, channels].
            uniforms: in [0, 1), [B, 4]: for the component, and for each colour.
        """
        weights, means, log_scales, shifts = (part[..., 0, 0] for part in self._parts(outputs[:, :, None, None]))
        chosen = (weights.exp().cumsum(dim=1) < uniforms[:, :1]).sum(dim=1).clamp(max=self.components - 1)
        rows = torch.arange(len(outputs), device=outputs.device)
        mean, scale, shift = (part[rows, chosen] for part in (means, log_scales.exp(), shifts))
        spread = scale * torch.logit(uniforms[:, 1:], eps=1e-6)
        red = _on_levels(mean[:, 0] + spread[:, 0])
        green = _on_levels(mean[:, 1] + shift[:, 0] * red + spread[:, 1])
        blue = _on_levels(mean[:, 2] + shift[:, 1] * red + shift[:, 2] * green + spread[:, 2])
        return torch.stack([red, green, blue], dim=1)

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log weights [B, M, S, S]; means, log scales and shifts [B, M, 3, S, S]."""
        raw = outputs.float().unflatten(1, (self.components, 10))
        weights = F.log_softmax(raw[:, :, 0], dim=1)
        return weights, raw[:, :, 1:4], raw[:, :, 4:7].clamp(min=_NARROWEST), torch.tanh(raw[:, :, 7:10])


def _shifted(means: Tensor, shifts: Tensor, red: Tensor, green: Tensor) -> Tensor:
    """Means of all colours, given those before them (equation 3)."""
    first, second, third = shifts.unbind(2)
    return torch.stack(
        [means[:, :, 0], means[:, :, 1] + first * red, means[:, :, 2] + second * red + third * green], dim=2
    )


def _on_levels(values: Tensor) -> Tensor:
    """The nearest grey level, still in [-1, 1]."""
    return _grey_levels(values).round().clamp(0, 255) / 127.5 - 1


def _grey_levels(values: Tensor) -> Tensor:
    """From [-1, 1] to [0, 255]."""
    return (values + 1) * 127.5
