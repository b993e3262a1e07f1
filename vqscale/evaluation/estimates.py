"""Estimates of log p(x) of held-out images with continuous latents, by many draws of each (`bounds`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.config.latents import ContinuousLatents
from vqscale.evaluation.bits import standard_error
from vqscale.evaluation.bounds import (
    Estimate,
    importance_bound,
    marginal,
    weights_from_posterior,
    weights_from_prior,
)
from vqscale.evaluation.measures import Shown, Together
from vqscale.evaluation.metrics import Doubles
from vqscale.models.prior import Prior
from vqscale.seeds import mix

Nats = Callable[[NDArray[np.uint8], Mapping[str, NDArray[Any]]], Doubles]
"""Images uint8 [n, S, S, 3] and latents by level name → -log p(x | z) [n]."""


class LikelihoodEstimates:
    """ELBO, IWAE-K, importance sampling and naive Monte Carlo of the first held-out images.

    All draws of an image follow from its number, so neither batches nor ranks change them.

    Args:
        settings: how many images and draws.
        pixel_nats: of the tokenizer.
        levels: level names, the coarsest first.
        prior: in evaluation mode, and computes in fp32.
        dimensions: values of an image.
        seed: the run's.
        device: of the prior.
        rows: draws that go through the networks together.
    """

    def __init__(
        self,
        settings: ContinuousLatents,
        pixel_nats: Nats,
        levels: Sequence[str],
        prior: Prior,
        dimensions: int,
        seed: int,
        device: torch.device,
        rows: int,
    ) -> None:
        self._settings, self._pixel_nats, self._levels, self._prior = settings, pixel_nats, list(levels), prior
        self._dimensions, self._seed, self._device, self._rows = dimensions, seed, device, rows
        self._numbers: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        self._weights = [np.empty((2, settings.draws, 0))]  # of the posterior's draws and of the prior's, in logarithms

    def add(self, shown: Shown) -> None:
        """Weigh draws of those that are among the first."""
        first = shown.numbers < self._settings.images
        if not first.any():
            return
        images, numbers = shown.images[first], shown.numbers[first]
        classes = self._prior.classes_of(torch.from_numpy(shown.labels[first]).to(self._device))
        posteriors = [torch.from_numpy(shown.encoded[name][first]).to(self._device) for name in self._levels]

        def log_likelihood(latents: list[Tensor]) -> Tensor:
            named = {name: own.cpu().numpy() for name, own in zip(self._levels, latents, strict=True)}
            many = np.tile(images, (len(latents[0]) // len(images), 1, 1, 1))
            return -torch.from_numpy(self._pixel_nats(many, named)).to(self._device)

        seeds, draws = [mix(self._seed, int(number), "estimates") for number in numbers], self._settings.draws
        weights = (
            weights_from_posterior(posteriors, log_likelihood, self._prior, classes, seeds, draws, self._rows),
            weights_from_prior(log_likelihood, self._prior, classes, seeds, draws, self._rows),
        )
        self._numbers.append(numbers)
        self._weights.append(torch.stack(weights).cpu().numpy())

    def figures(self, ranks: Together) -> dict[str, Any]:
        """Bits per dimension by estimate, with standard errors over images and draws, and effective sample sizes."""
        gathered = ranks.gather((np.concatenate(self._numbers), np.concatenate(self._weights, axis=2)))
        order = np.argsort(np.concatenate([numbers for numbers, _ in gathered]))
        if not len(order):
            return {}
        posterior, prior = torch.from_numpy(np.concatenate([weights for _, weights in gathered], axis=2)[:, :, order])
        elbo, bound = importance_bound(posterior, 1), importance_bound(posterior, self._settings.importance)
        estimates = {
            "elbo": elbo,
            "iwae": bound,
            "importance_sampling": marginal(posterior),
            "naive": marginal(prior),
        }
        found: dict[str, Any] = {
            "estimate_images": len(order),
            "estimate_draws": self._settings.draws,
            "estimate_iwae_draws": self._settings.importance,
        }
        for name, estimate in estimates.items():
            found |= self._named(f"estimate_{name}", estimate)
        gain, bit = (elbo.nats - bound.nats).tolist(), self._dimensions * math.log(2)
        found["estimate_iwae_gain"] = sum(gain) / len(gain) / bit
        return found | _finite({"estimate_iwae_gain_error": standard_error(gain) / bit})

    def _named(self, name: str, estimate: Estimate) -> dict[str, float]:
        figures = estimate.figures(self._dimensions)
        others = {f"{name}_{key}": figures[key] for key in ("error", "draw_error", "effective")}
        return {name: figures["bits_per_dim"]} | _finite(others)


def best_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The least bits per dimension that were shown to suffice for all held-out images, and what they are.

    Of continuous latents it is the ELBO of all images, less what the importance-weighted bound has gained on some of
    them. The gain is a difference within each image, so its error is far below that of the bound over so few.

    Args:
        figures: those of the likelihoods, and of the estimates if there are any.
    """
    if "bits_per_dim" not in figures:
        return {}
    known = (figures[key] for key in ("bits_per_dim", "bits_per_dim_error", "bits_per_dim_is"))
    if "estimate_iwae_gain_error" not in figures:
        return dict(zip(_BEST, known, strict=True))
    bits, error, _ = known
    gain, of_gain = figures["estimate_iwae_gain"], figures["estimate_iwae_gain_error"]
    best = (bits - gain, math.hypot(error, of_gain), f"IWAE-{figures['estimate_iwae_draws']} bound")
    return dict(zip(_BEST, best, strict=True))


_BEST = ("bits_per_dim_best", "bits_per_dim_best_error", "bits_per_dim_best_is")


def _finite(figures: dict[str, float]) -> dict[str, float]:
    """Without errors that one image, or one draw, does not have."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}
