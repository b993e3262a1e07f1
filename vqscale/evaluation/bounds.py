"""Estimates of log p(x) of a model with continuous latents, in nats and bits per dimension.

All of them are means of weights w, whose mean is p(x) (Burda et al. 2016, section 3; Wu et al. 2017):

- naive Monte Carlo: z from the prior, w = p(x | z). It has to hit the few z that x came from, so its variance explodes
  with the latents' information about x.
- importance sampling: z from the posterior, w = p(x | z) p(z) / q(z | x).
- the importance-weighted bound of K draws, E[log of the mean of K weights]; K = 1 is the evidence lower bound (ELBO).

The first two estimate p(x) without bias. Their logarithm is biased downwards, by about the relative variance of the
mean over two, so the nats are too high rather than too low.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.evaluation.bits import standard_error
from vqscale.models.bounds import log_mean_exp
from vqscale.models.generate import Draws, Sampling
from vqscale.models.latents import draw
from vqscale.models.prior import Prior
from vqscale.seeds import mix

Likelihood = Callable[[list[Tensor]], Tensor]
"""Latents by level, the coarsest first, of some draws of all N images one after the other → log p(x | z) of each."""


@dataclass(frozen=True)
class Estimate:
    """-log p(x) of images, or what is at least that; float64 [N] each."""

    nats: Tensor
    error: Tensor
    """Standard error of each, from its draws. Where few weights hold all of the mass, it is too small itself."""
    effective: Tensor
    """Effective sample size (sum w)² / sum w² (Kong 1992): how many draws of equal weight the draws are worth."""

    def figures(self, dimensions: int) -> dict[str, float]:
        """In bits per dimension, of which an image has so many.

        `error` is the standard error over images and draws together, `draw_error` what of it comes from the draws,
        `effective` the median.
        """
        bit = dimensions * math.log(2)
        return {
            "bits_per_dim": float(self.nats.mean()) / bit,
            "error": standard_error(self.nats.tolist()) / bit,
            "draw_error": float(self.error.square().sum().sqrt()) / len(self.error) / bit,
            "effective": float(self.effective.median()),
        }


def marginal(log_weights: Tensor) -> Estimate:
    """-log of the mean weight, from log w float64 [K, N] of K draws an image; naive or by importance, as w is.

    The error is that of the mean over the mean (delta method).
    """
    count = len(log_weights)
    relative = (log_weights - log_weights.amax(0)).exp()
    mean = relative.mean(0)
    spread = relative.std(0) if count > 1 else torch.full_like(mean, math.nan)
    return Estimate(-log_mean_exp(log_weights), spread / mean / math.sqrt(count), effective_size(log_weights))


def importance_bound(log_weights: Tensor, draws: int) -> Estimate:
    """Minus the importance-weighted bound of so many draws: the mean over groups of them, of log w float64 [K, N].

    Raises:
        ValueError: K is not a multiple of `draws`.
    """
    count = len(log_weights)
    if count % draws:
        raise ValueError(f"{count} weights are not a multiple of {draws}")
    groups = log_weights.unflatten(0, (-1, draws))
    bounds = torch.stack([log_mean_exp(group) for group in groups])
    error = bounds.std(0) / math.sqrt(len(bounds)) if len(bounds) > 1 else torch.full_like(bounds[0], math.nan)
    return Estimate(-bounds.mean(0), error, torch.stack([effective_size(group) for group in groups]).mean(0))


def effective_size(log_weights: Tensor) -> Tensor:
    """Effective sample size [N] of log w [K, N], from 1 to K."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


@torch.no_grad()
def weights_from_posterior(
    posteriors: Sequence[Tensor],
    log_likelihood: Likelihood,
    prior: Prior,
    classes: Tensor,
    seeds: Sequence[int],
    draws: int,
    rows: int = 256,
) -> Tensor:
    """Log p(x | z) + log p(z) - log q(z | x) of z from the posterior: float64 [draws, N].

    Args:
        posteriors: [N, 2 · channels, side, side] a level, the coarsest first.
        log_likelihood: of the images.
        prior: in evaluation mode; exact, or the estimates are bounds.
        classes: int64 [N].
        seeds: one an image, from which all of its draws come.
        draws: how many an image.
        rows: the most draws that go through the networks together, if there are not more images.
    """
    source, found = Draws(Sampling(), seeds, classes.device), []
    for count in _parts(draws, len(seeds), rows):
        many = [level.repeat(count, 1, 1, 1) for level in posteriors]
        drawn = draw(many, _normals(source, [level[0].numel() // 2 for level in posteriors], count))
        log_weight = log_likelihood(drawn.latents).double() - drawn.log_density.double()
        for nats in prior(drawn.latents, classes.repeat(count)):
            log_weight = log_weight - nats.double()
        found.append(log_weight.view(count, -1))
    return torch.cat(found)


@torch.no_grad()
def weights_from_prior(
    log_likelihood: Likelihood, prior: Prior, classes: Tensor, seeds: Sequence[int], draws: int, rows: int = 256
) -> Tensor:
    """Log p(x | z) of z from the prior: float64 [draws, N]; arguments as for `weights_from_posterior`."""
    found, first = [], 0
    for count in _parts(draws, len(seeds), rows):
        each = [mix(seed, number) for number in range(first, first + count) for seed in seeds]
        latents = prior.generate(classes.repeat(count), each, Sampling())
        found.append(log_likelihood(latents).double().view(count, -1))
        first += count
    return torch.cat(found)


def _parts(draws: int, images: int, rows: int) -> list[int]:
    """How many draws of all images are made together."""
    most = max(1, rows // images)
    return [min(most, draws - first) for first in range(0, draws, most)]


def _normals(source: Draws, sizes: Sequence[int], count: int) -> Tensor:
    """Standard normal numbers for so many draws, fp32 [count · N, values]: the next ones of each image."""
    numbers = source.normals(count * sum(sizes)).float()
    return numbers.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)
