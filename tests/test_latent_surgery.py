"""ELBO surgery of Gaussian posteriors, where the parts are known, and what flows make of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training_helpers import OneRank
from vqscale.evaluation.image_nats import ImageNats
from vqscale.evaluation.latent_surgery import active_units, aggregated_nats, dissect_latents
from vqscale.evaluation.latents import PosteriorSurgery
from vqscale.evaluation.measures import Shown
from vqscale.models.density import normal_nats
from vqscale.models.gaussian import draw_latents, one_row_each, posterior_nats
from vqscale.models.latent_watch import ACTIVE_ABOVE, LatentWatch
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


def test_collapsed_posteriors_tell_nothing() -> None:
    rows = posteriors(50, 4, 0.0, 1.0)
    z = draws(rows)
    found = dissect_latents(rows, z, normal_nats(z).sum(1))
    assert [found.information, found.gap, found.rate] == pytest.approx([0, 0, 0], abs=1e-9)
    assert active_units(rows) == 0


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


def by_class(rows: Tensor, z: Tensor, classes: Tensor) -> Tensor:
    """-log of the best prior that is given the class."""
    nats = torch.empty(len(z), dtype=z.dtype)
    for known in classes.unique():
        own = classes == known
        nats[own] = aggregated_nats(rows[own], z[own])
    return nats


def test_a_prior_that_knows_the_class_is_compared_class_by_class() -> None:
    """Else what the class tells would be taken off the divergence, which for the best prior came to -log 3."""
    rows, classes = posteriors(120, 2, 1.0, 0.5), torch.arange(120) % 3
    rows[:, 0] += 100.0 * classes
    z = draws(rows)
    best = by_class(rows, z, classes)
    found, mixed = dissect_latents(rows, z, best, classes), dissect_latents(rows, z, best)
    assert (found.gap, found.gap_error) == pytest.approx((0, 0), abs=1e-9)
    assert found.rate == pytest.approx(found.information)
    assert mixed.gap == pytest.approx(-math.log(3), abs=1e-6)
    assert mixed.information - found.information == pytest.approx(math.log(3), abs=1e-6)
    alike = dissect_latents(rows, z, best, torch.zeros_like(classes))
    assert alike == mixed, "a single class is none"


class Told:
    """A prior whose nats are planted; the class is given to it."""

    def __init__(self, nats: Tensor) -> None:
        self._nats = nats

    def of_images(self, _: object) -> ImageNats:
        zeros = np.zeros(len(self._nats))
        return ImageNats(zeros, zeros, zeros, {"top": self._nats.numpy()})

    def told(self, labels: Tensor) -> Tensor:
        return labels


def test_the_report_says_both_informations_where_the_prior_is_given_the_class() -> None:
    """In whatever order the images come, and over those alone that are among the first."""
    count, classes = 60, torch.arange(60) % 3
    rows = posteriors(count, 2, 1.0, 0.5).float()
    rows[:, 0] += 100.0 * classes
    z = draws(rows)
    best = by_class(rows[:30].double(), z[:30].double(), classes[:30])
    likelihoods = Told(torch.cat([best, torch.full((30,), 1e9, dtype=torch.float64)]))
    surgery = PosteriorSurgery(["top"], 30, likelihoods)  # type: ignore[arg-type]
    for part in torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(7):
        encoded, latents = rows[part][:, :, None, None].numpy(), z[part][:, :, None, None].numpy()
        empty = np.zeros((len(part), 1, 1, 3))
        surgery.add(
            Shown(
                part.numpy(),
                classes[part].numpy(),
                empty.astype(np.uint8),
                {"top": encoded},
                {"top": latents},
                np.zeros(len(part)),
                empty.astype(np.float32),
            )
        )
    found = surgery.figures(OneRank())
    assert found["latent_images"] == 30
    assert found["latent_bits_kl_prior"] == pytest.approx(0, abs=1e-5)
    assert found["latent_bits_rate"] == pytest.approx(found["latent_bits_mutual_information_given_class"], abs=1e-5)
    more = found["latent_bits_mutual_information"] - found["latent_bits_mutual_information_given_class"]
    assert more == pytest.approx(math.log2(3), abs=1e-5)


def test_active_units_are_those_whose_means_vary() -> None:
    rows = posteriors(200, 5, 1.0, 0.5)
    rows[:, 2], rows[:, 7] = 0.05, 0.0  # the third unit is the prior but for a shift
    assert active_units(rows) == 4
    with pytest.raises(ValueError, match="there are 1"):
        active_units(rows[:1])


def test_a_unit_is_active_here_and_while_training_alike() -> None:
    """Means one above the other: their variance over these images is 0.0099, over all that they stand for 0.0119."""
    means = 0.0995 * torch.tensor([-1.0, 1.0] * 3)[:, None]
    rows = torch.cat([means, torch.zeros_like(means)], dim=1)
    watch = LatentWatch(["top"], [(1, 1)], torch.device("cpu"))
    watch.see([rows[:, :, None, None]])
    assert active_units(rows) == watch.figures()["top"]["active"] == 0
    assert means.var() > ACTIVE_ABOVE > means.var(correction=0)


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
