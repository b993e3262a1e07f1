"""ELBO surgery for Gaussian posteriors: where the nats of continuous latents go (Hoffman & Johnson 2016).

Over N images, with q(z) the mean of their posteriors, the KL term of the bound falls into two parts:

    mean of KL(q(z | x_n) || p(z)) = I(n; z) + KL(q(z) || p(z))

the information of the latents about which image it is, at most log N, and what the prior has not learned of the
aggregated posterior, which a better prior saves.

Both are estimated by one draw of each posterior. q(z) is the mixture of all N posteriors, with that which z was drawn
from among them: then it is q(z) of these N images, and the estimates are unbiased for them. For the population that
the images come from, the information is too low (never above log N), and the divergence too high by as much: posteriors
that do not overlap give log N exactly, whatever the population's is. So N belongs to every figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.evaluation.likelihood import standard_error
from vqscale.models.gaussian import component_nats, kl_to_normal, means_and_scales, posterior_nats

_ROWS = 256
"""Latents that are compared with all posteriors at once."""
ACTIVE = 0.01
"""Variance over images from which a unit counts as active (Burda et al. 2016, section 5)."""


@dataclass(frozen=True)
class LatentSurgery:
    """Nats an image, each with its standard error over the images."""

    images: int
    reconstruction: float
    """-log p(x | z); NaN where it was not given."""
    reconstruction_error: float
    rate: float
    """E[log q(z | x) - log p(z)], what the latents cost; the sum of the next two."""
    rate_error: float
    information: float
    """Mutual information of image and latents, at most `ceiling`."""
    information_error: float
    gap: float
    """KL of the aggregated posterior to the prior."""
    gap_error: float

    @property
    def ceiling(self) -> float:
        """The most that the information can be: log N."""
        return math.log(self.images)


def dissect_latents(
    posteriors: Tensor, latents: Tensor, prior_nats: Tensor, reconstruction_nats: Tensor | None = None
) -> LatentSurgery:
    """Take the bound apart.

    Args:
        posteriors: of all images, those of all levels one after the other: [N, 2 · D], means, then log scales.
        latents: a draw of each posterior, [N, D].
        prior_nats: -log p(z) [N] of these draws.
        reconstruction_nats: -log p(x | z) [N] at these draws.

    Raises:
        ValueError: there are no images.
    """
    if not len(posteriors):
        raise ValueError("no images were given")
    own = posterior_nats(posteriors.double(), latents.double())
    aggregated = aggregated_nats(posteriors, latents)
    if reconstruction_nats is None:
        reconstruction_nats = torch.full_like(own, math.nan)
    columns = (reconstruction_nats, prior_nats - own, aggregated - own, prior_nats - aggregated)
    figures = [float(figure) for column in columns for figure in (column.double().mean(), _error(column))]
    return LatentSurgery(len(posteriors), *figures)


def aggregated_nats(posteriors: Tensor, latents: Tensor) -> Tensor:
    """-log q(z) float64 [n] of latents [n, D] under the mean of posteriors [N, 2 · D]: n · N · D multiplications."""
    parts = (-component_nats(posteriors, rows) for rows in latents.split(_ROWS))
    return torch.cat([math.log(len(posteriors)) - part.logsumexp(1) for part in parts])


@dataclass(frozen=True)
class Units:
    """What each latent value, a unit, tells of the images; float64 [D] each."""

    variance: Tensor
    """Of its posterior mean over the images (Burda et al. 2016): 0 where the posterior has collapsed."""
    kl: Tensor
    """Mean KL to the standard normal, in nats."""

    @property
    def active(self) -> int:
        """Units whose mean varies by more than 0.01."""
        return int((self.variance > ACTIVE).sum())


def units(posteriors: Tensor) -> Units:
    """Activity of the units of posteriors [N, 2 · D].

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(posteriors) < 2:
        raise ValueError(f"variance over images needs two of them, there are {len(posteriors)}")
    means, _ = means_and_scales(posteriors.double())
    return Units(means.var(0), kl_to_normal(posteriors.double()).mean(0))


def one_row_each(levels: Sequence[Tensor]) -> Tensor:
    """Posteriors [N, 2 · channels, side, side] a level to [N, 2 · D]: all means, then all log scales."""
    parts = [means_and_scales(level) for level in levels]
    return torch.cat([part.flatten(1) for halves in zip(*parts, strict=True) for part in halves], dim=1)


def _error(column: Tensor) -> float:
    return standard_error(column.tolist())
