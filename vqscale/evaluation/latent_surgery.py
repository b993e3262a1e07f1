"""ELBO surgery for Gaussian posteriors: where the nats of continuous latents go (Hoffman & Johnson 2016).

Over N images, with q(z) the mean of their posteriors, the KL term of the bound falls into two parts:

    mean of KL(q(z | x_n) || p(z)) = I(n; z) + KL(q(z) || p(z))

the information of the latents about which image it is, at most log N, and what the prior has not learned of the
aggregated posterior, which a better prior saves. A prior that is given the class y is compared with q(z | y), the mean
over the images of that class, as its codes are in `surgery`: then the first part is I(n; z | y), and the second a mean
over the classes. Mixed, they would come to KL - I(y; z), which can be negative.

Both are estimated by one draw of each posterior. q(z) is the mixture of all N posteriors, with that which z was drawn
from among them: then it is q(z) of these N images, and the estimates are unbiased for them. For the population that
the images come from, the information is too low (never above log N), and the divergence too high by as much: posteriors
that do not overlap give log N exactly, whatever the population's is. So N belongs to every figure; class by class it is
the number of images of the class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.evaluation.bits import standard_error
from vqscale.models.gaussian import component_nats, means_and_scales, posterior_nats
from vqscale.models.latent_watch import ACTIVE_ABOVE

_ROWS = 256
"""Latents that are compared with all posteriors at once."""


@dataclass(frozen=True)
class LatentSurgery:
    """Nats an image, each with its standard error over the images."""

    images: int
    rate: float
    """E[log q(z | x) - log p(z)], what the latents cost; the sum of the next two."""
    rate_error: float
    information: float
    """Mutual information of image and latents, at most `ceiling`; given the class, where the prior is given it."""
    information_error: float
    gap: float
    """KL of the aggregated posterior to the prior; class by class, where the prior is given it."""
    gap_error: float

    @property
    def ceiling(self) -> float:
        """The most that the information can be: log N."""
        return math.log(self.images)


def dissect_latents(
    posteriors: Tensor, latents: Tensor, prior_nats: Tensor, classes: Tensor | None = None
) -> LatentSurgery:
    """Take the price of the latents apart.

    Args:
        posteriors: of all images, those of all levels one after the other: [N, 2 · D], means, then log scales.
        latents: a draw of each posterior, [N, D].
        prior_nats: -log p(z) [N] of these draws.
        classes: int64 [N], which the prior was given; None if it was given none.

    Raises:
        ValueError: there are no images.
    """
    if not len(posteriors):
        raise ValueError("no images were given")
    own = posterior_nats(posteriors.double(), latents.double())
    aggregated = torch.empty_like(own)
    for rows in _groups(classes, len(posteriors)):
        aggregated[rows] = aggregated_nats(posteriors[rows], latents[rows])
    columns = (prior_nats - own, aggregated - own, prior_nats - aggregated)
    figures = [float(figure) for column in columns for figure in (column.double().mean(), _error(column))]
    return LatentSurgery(len(posteriors), *figures)


def aggregated_nats(posteriors: Tensor, latents: Tensor) -> Tensor:
    """-log q(z) float64 [n] of latents [n, D] under the mean of posteriors [N, 2 · D]: n · N · D multiplications."""
    parts = (-component_nats(posteriors, rows) for rows in latents.split(_ROWS))
    return torch.cat([math.log(len(posteriors)) - part.logsumexp(1) for part in parts])


def active_units(posteriors: Tensor) -> int:
    """How many latent values of posteriors [N, 2 · D] are active: their mean varies over the images.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(posteriors) < 2:
        raise ValueError(f"variance over images needs two of them, there are {len(posteriors)}")
    means, _ = means_and_scales(posteriors.double())
    return int((means.var(0, correction=0) > ACTIVE_ABOVE).sum())


def _groups(classes: Tensor | None, count: int) -> list[Tensor]:
    """Places of the images of each class."""
    if classes is None:
        return [torch.arange(count)]
    return [(classes == known).nonzero()[:, 0] for known in classes.unique()]


def _error(column: Tensor) -> float:
    return standard_error(column.tolist())
