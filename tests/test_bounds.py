"""Estimates of log p(x), beside a model whose log p(x) is known: probabilistic PCA (Tipping & Bishop 1999)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vqscale.evaluation.bounds import (
    Estimate,
    effective_size,
    importance_bound,
    marginal,
    weights_from_posterior,
    weights_from_prior,
)
from vqscale.models.density import Normal, normal_nats
from vqscale.models.gaussian import draw_latents, kl_to_normal, posterior_nats
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior

torch.set_num_threads(1)  # what is computed is small: more threads would wait for each other
IMAGES, SIZE = 40, 8


class PCA:
    """x = W z + sigma · noise with z from the standard normal; the columns of W stand at right angles.

    So the exact posterior has a diagonal covariance, as those of an encoder.
    """

    def __init__(self, latents: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        directions, _ = torch.linalg.qr(torch.randn(SIZE, latents, dtype=torch.float64, generator=generator))
        self.weights = directions * torch.linspace(1, 2, latents, dtype=torch.float64)
        self.noise, self.latents = noise, latents
        z = torch.randn(IMAGES, latents, dtype=torch.float64, generator=generator)
        self.images = z @ self.weights.T + noise * torch.randn(IMAGES, SIZE, dtype=torch.float64, generator=generator)
        self.prior = Prior([Normal([GridShape(1, 0, latents)], 0)])
        self.classes, self.seeds = torch.zeros(IMAGES, dtype=torch.int64), list(range(IMAGES))

    def truth(self) -> Tensor:
        """-log p(x) [IMAGES]."""
        covariance = self.weights @ self.weights.T + self.noise**2 * torch.eye(SIZE, dtype=torch.float64)
        normal = torch.distributions.MultivariateNormal(torch.zeros(SIZE, dtype=torch.float64), covariance)
        return -normal.log_prob(self.images)

    def posteriors(self, shift: float = 0.0, widen: float = 1.0) -> Tensor:
        """The exact ones [IMAGES, 2 · latents, 1, 1], moved by so many of their scales, and wider."""
        precision = 1 + (self.weights**2).sum(0) / self.noise**2
        scales = precision.rsqrt().expand(IMAGES, -1)
        means = self.images @ self.weights / self.noise**2 / precision + shift * scales
        return torch.cat([means, (widen * scales).log()], dim=1)[:, :, None, None]

    def log_likelihood(self, latents: list[Tensor]) -> Tensor:
        """Log p(x | z) of each image at its latents."""
        (z,) = latents
        residual = (self.images.repeat(len(z) // IMAGES, 1) - z.flatten(1).double() @ self.weights.T) / self.noise
        return -(normal_nats(residual) + math.log(self.noise)).sum(1)

    def elbo(self, posteriors: Tensor) -> Tensor:
        """Minus the evidence lower bound [IMAGES], in closed form."""
        means, log_scales = posteriors.flatten(1).chunk(2, dim=1)
        spread = (2 * log_scales).exp() @ (self.weights**2).sum(0) / (2 * self.noise**2)
        return spread - self.log_likelihood([means[:, :, None, None]]) + kl_to_normal(posteriors).flatten(1).sum(1)

    def by_importance(self, posteriors: Tensor, draws: int) -> Tensor:
        return weights_from_posterior([posteriors], self.log_likelihood, self.prior, self.classes, self.seeds, draws)

    def naive(self, draws: int) -> Tensor:
        return weights_from_prior(self.log_likelihood, self.prior, self.classes, self.seeds, draws)


def test_closed_form_kl_equals_a_monte_carlo_estimate() -> None:
    generator = torch.Generator().manual_seed(0)
    posterior = torch.randn(1, 6, 2, 2, dtype=torch.float64, generator=generator) * 0.7
    normals = torch.randn(20_000, 3, 2, 2, dtype=torch.float64, generator=generator)
    many = posterior.expand(len(normals), -1, -1, -1)
    z = draw_latents(many, normals)
    drawn = normal_nats(z).flatten(1).sum(1) - posterior_nats(many, z)
    error = drawn.std().item() / math.sqrt(len(drawn))
    assert drawn.mean().item() == pytest.approx(kl_to_normal(posterior).sum().item(), abs=4 * error)
    normal = torch.distributions.Normal(posterior[:, :3], posterior[:, 3:].exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_to_normal(posterior), expected)
    torch.testing.assert_close(posterior_nats(many, z), -normal.log_prob(z).flatten(1).sum(1))


def test_with_the_exact_posterior_every_draw_gives_the_truth() -> None:
    model = PCA(2, 0.5)
    log_weights = model.by_importance(model.posteriors(), 4)
    torch.testing.assert_close(-log_weights, model.truth().expand(4, -1), atol=1e-9, rtol=0)
    torch.testing.assert_close(model.elbo(model.posteriors()), model.truth())
    torch.testing.assert_close(marginal(log_weights).effective, torch.full((IMAGES,), 4.0, dtype=torch.float64))


def test_naive_and_importance_sampling_find_the_truth() -> None:
    model = PCA(2, 0.7)
    importance = marginal(model.by_importance(model.posteriors(shift=0.5, widen=1.3), 400))
    naive = marginal(model.naive(1500))
    for estimate in (importance, naive):
        away = (estimate.nats - model.truth()) / estimate.error
        assert away.square().mean().sqrt() < 1.6, "the errors are what they are said to be"
        assert abs(away.mean()) < 1
    assert importance.error.mean() < naive.error.mean() / 2, "of a quarter of the draws"


def test_one_draw_is_the_elbo_and_more_draws_do_not_raise_the_nats() -> None:
    model, bounds = PCA(2, 0.5), []
    posteriors = model.posteriors(shift=0.8, widen=1.4)
    log_weights = model.by_importance(posteriors, 512)
    for draws in (1, 4, 16, 64):
        bounds.append(importance_bound(log_weights, draws))
    away = (bounds[0].nats - model.elbo(posteriors)) / bounds[0].error
    assert away.square().mean().sqrt() < 1.5
    means = [float(bound.nats.mean()) for bound in bounds]
    errors = [float(bound.error.square().sum().sqrt()) / IMAGES for bound in bounds]
    for number in range(3):
        assert means[number + 1] < means[number] + 3 * (errors[number] + errors[number + 1])
    assert means[0] - means[3] > 10 * errors[0], "it does get tighter"
    assert means[3] > float(model.truth().mean()) - 3 * errors[3]


def test_the_naive_variance_explodes_where_that_of_importance_sampling_does_not() -> None:
    """The less noise, the more the latents say of an image, and the fewer draws of the prior explain it."""
    worth: dict[float, tuple[float, float]] = {}
    for noise in (0.5, 0.02):
        model = PCA(6, noise)
        importance = marginal(model.by_importance(model.posteriors(shift=0.3, widen=1.2), 200))
        naive = marginal(model.naive(200))
        worth[noise] = (float(naive.effective.median()), float(importance.effective.median()))
        assert float((importance.nats - model.truth()).abs().mean()) < 0.2
    assert worth[0.02][0] < 1.2, "one draw holds everything"
    assert worth[0.02][1] > 50
    assert worth[0.02][1] > 0.8 * worth[0.5][1]
    assert float((naive.nats - model.truth()).mean()) > 100, "and the estimate is far off"


def test_effective_sizes_count_equal_weights() -> None:
    log_weights = torch.tensor([[0.0, -900.0], [0.0, 5.0], [-math.inf, -900.0]], dtype=torch.float64)
    torch.testing.assert_close(effective_size(log_weights), torch.tensor([2.0, 1.0], dtype=torch.float64))


def test_figures_are_in_bits_per_dimension() -> None:
    estimate = Estimate(torch.tensor([4.0, 8.0]), torch.zeros(2), torch.ones(2))
    bit = SIZE * math.log(2)
    figures = estimate.figures(SIZE)
    assert figures == pytest.approx({"bits_per_dim": 6 / bit, "error": 2 / bit, "draw_error": 0, "effective": 1})
    drawn = marginal(torch.tensor([[-1.0, -2.0], [-1.0, -4.0]], dtype=torch.float64))
    assert drawn.nats[1].item() == pytest.approx(-math.log((math.exp(-2) + math.exp(-4)) / 2))
    assert drawn.error[0].item() == 0
    with pytest.raises(ValueError, match="2 weights are not a multiple of 3"):
        importance_bound(torch.zeros(2, 1), 3)


def test_estimates_do_not_depend_on_the_batch() -> None:
    model = PCA(2, 0.5)
    whole = model.by_importance(model.posteriors(), 3)
    single = weights_from_posterior(
        [model.posteriors()[7:8]],
        lambda latents: (
            -(normal_nats((model.images[7:8] - latents[0].flatten(1) @ model.weights.T) / 0.5) + math.log(0.5)).sum(1)
        ),
        model.prior,
        model.classes[:1],
        [7],
        3,
    )
    torch.testing.assert_close(single[:, 0], whole[:, 7])
