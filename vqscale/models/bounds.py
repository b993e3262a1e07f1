"""Lower bounds on log p(x) of a model with latents, from what `vae.VAE` measures; all in nats an image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.models.vae import Terms


def elbo(terms: Terms, divergences: Sequence[Tensor]) -> Tensor:
    """[B]: E[log p(x | z)], a mean over the draws, less KL(q || p) in closed form (Kingma & Welling 2014, eq. 7).

    Args:
        terms: of K draws.
        divergences: [B, C] a level.
    """
    return terms.likelihood.mean(dim=0) - torch.stack([own.sum(dim=1) for own in divergences]).sum(dim=0)


def iwae(likelihood: Tensor, ratio: Tensor) -> Tensor:
    """[B]: log 1/K Σ_k p(x | z_k) p(z_k) / q(z_k | x), whose mean does not fall with K (Burda et al. 2016, equation 8).

    With one draw it estimates the ELBO.

    Args:
        likelihood: log p(x | z_k), [K, B].
        ratio: log p(z_k) - log q(z_k | x), [K, B].
    """
    return log_mean_exp(likelihood + ratio)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Log of the mean over the first dimension of log weights [K, ...]."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def free_bits(divergences: Tensor, latest: Tensor, least: float) -> Tensor:
    """[C]: divergences of channels, of which those below `least` are held there and not lowered any further.

    Kingma et al. (2016, equation 15) compare the mean over the batch. Ranks and micro-batches each see a part of it, so
    what is compared is the mean over the whole batch of the step before.

    Args:
        divergences: [C], with gradients.
        latest: [C], of the global batch before.
        least: nats an image.
    """
    return torch.where(latest >= least, divergences, torch.full_like(divergences, least))
