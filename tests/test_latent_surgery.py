"""ELBO surgery of Gaussian posteriors, where the parts are known, and what flows make of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vqscale.evaluation.latent_surgery import aggregated_nats, dissect_latents, one_row_each, units
from vqscale.models.density import normal_nats
from vqscale.models.gaussian import draw_latents, posterior_nats
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior
from vqscale.models.realnvp import RealNVP


def posteriors(count: int, size: int, spread: float, scale: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(count, size, dtype=torch.float64, generator=generator)
    return torch.cat([means, torch.full_like(means, math.log(scale))], dim=1)


def draws(rows: Tensor, seed: int = 1) -> Tensor:
    size = rows.shape[1] // 2
    generator = torch.Generator().manual_seed(seed)
    return draw_latents(rows, torch.randn(len(rows), size, dtype=rows.dtype, generator=generator))


def test_the_aggregated_posterior_is_the_mean_of_all() -> None:
    rows = posteriors(300, 3, 1.0, 0.4)
    z = draws(rows)
    each = torch.stack([-posterior_nats(rows[n : n + 1].expand(300, -1), z) for n in range(300)])
    torch.testing.assert_close(aggregated_nats(rows, z), math.log(300) - each.logsumexp(0))


def test_posteriors_far_apart_tell_which_image_it_is() -> None:
    """Then the information is log N to the last digit, and the rest of the rate is the gap."""
    rows = posteriors(50, 4, 100.0, 0.1)
    z = draws(rows)
    found = dissect_latents(rows, z, normal_nats(z).sum(1))
    assert found.information == pytest.approx(math.log(50)) == found.ceiling
    assert found.information_error == pytest.approx(0, abs=1e-8)
    assert found.rate == pytest.approx(found.information + found.gap)
    assert math.isnan(found.reconstruction)


def test_collapsed_posteriors_tell_nothing() -> None:
    rows = posteriors(50, 4, 0.0, 1.0)
    z = draws(rows)
    found = dissect_latents(rows, z, normal_nats(z).sum(1), torch.full((50,), 7.0))
    assert [found.information, found.gap, found.rate] == pytest.approx([0, 0, 0], abs=1e-9)
    assert (found.reconstruction, found.reconstruction_error) == (7, 0)
    assert units(rows).active == 0


def test_the_parts_are_those_of_a_gaussian_channel() -> None:
    """With means of variance v and posteriors of variance s², I = log(1 + v / s²) / 2 a unit, if N is large enough.

    The prior N(0, v + s²) has no gap, the standard normal has that of two normal distributions.
    """
    variance, scale, size = 0.64, 0.8, 2
    rows = posteriors(4000, size, math.sqrt(variance), scale)
    z, total = draws(rows), variance + scale**2
    known = size * math.log(1 + variance / scale**2) / 2
    fitting = (normal_nats(z / math.sqrt(total)) + math.log(total) / 2).sum(1)
    best, plain = dissect_latents(rows, z, fitting), dissect_latents(rows, z, normal_nats(z).sum(1))
    assert best.information == pytest.approx(known, abs=4 * best.information_error + 0.01)
    assert best.gap == pytest.approx(0, abs=4 * best.gap_error + 0.01)
    assert plain.gap == pytest.approx(size * (total - 1 - math.log(total)) / 2, abs=4 * plain.gap_error + 0.01)
    few = dissect_latents(rows[:5], z[:5], fitting[:5])
    assert few.information <= few.ceiling + 1e-9


def test_active_units_are_those_whose_means_vary() -> None:
    rows = posteriors(200, 5, 1.0, 0.5)
    rows[:, 2], rows[:, 7] = 0.05, 0.0  # the third unit is the prior but for a shift
    found = units(rows)
    assert found.active == 4
    assert found.variance[2] < 1e-20
    assert found.kl[2].item() == pytest.approx(0.05**2 / 2)
    assert (found.kl[[0, 1, 3, 4]] > 0.3).all()
    with pytest.raises(ValueError, match="there are 1"):
        units(rows[:1])


def test_levels_stand_one_after_the_other_with_all_means_first() -> None:
    levels = [torch.randn(3, 4, 2, 2), torch.randn(3, 2, 4, 4)]
    rows = one_row_each(levels)
    assert rows.shape == (3, 2 * (8 + 16))
    z = [torch.randn(3, 2, 2, 2), torch.randn(3, 1, 4, 4)]
    together = posterior_nats(rows, torch.cat([level.flatten(1) for level in z], dim=1))
    torch.testing.assert_close(together, sum(posterior_nats(*pair) for pair in zip(levels, z, strict=True)))


def test_a_flow_does_not_worsen_the_gap_on_held_out_latents() -> None:
    """It begins as the standard normal, and the information does not depend on the prior."""
    torch.manual_seed(0)
    corners = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    means = corners[torch.randint(2, (2000,))] * 1.2
    rows = torch.cat([means, torch.full_like(means, math.log(0.4))], dim=1)
    training, held_out = rows[:1500], rows[1500:]
    prior = Prior([RealNVP([GridShape(1, 0, 2)], 1, couplings=4, width=16)])
    optimizer = torch.optim.Adam(prior.parameters(), lr=5e-3)

    def nats(z: Tensor) -> Tensor:
        return prior([z[:, :, None, None]], torch.zeros(len(z), dtype=torch.int64))[0]

    for step in range(120):
        batch = training[torch.randint(len(training), (128,))]
        loss = nats(draws(batch, seed=step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = draws(held_out)
    plain = dissect_latents(held_out, z, normal_nats(z).sum(1))
    flow = dissect_latents(held_out, z, nats(z).detach())
    assert flow.information == plain.information
    assert flow.gap < plain.gap - 3 * (flow.gap_error + plain.gap_error)
