"""The aggregated posterior as a prior: a mixture, by class and level, the best there is, and overfitted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vqscale.errors import UserError
from vqscale.evaluation.latent_surgery import dissect_latents
from vqscale.models.aggregated import Aggregated
from vqscale.models.density import Normal, normal_nats
from vqscale.models.gaussian import draw_latents, one_row_each
from vqscale.models.generate import Sampling
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior
from vqscale.training.exemplars import show_exemplars

TOP, BOTTOM = GridShape(1, 0, 2), GridShape(2, 0, 1)
IMAGES = 6


def posteriors(count: int = IMAGES, seed: int = 0, scale: float = 0.4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, grid.channels, grid.side, grid.side) for grid in (TOP, BOTTOM)]
    means = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.cat([level, torch.full_like(level, math.log(scale))], dim=1) for level in means]


def draws(levels: list[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [draw_latents(level, torch.randn(level.chunk(2, dim=1)[0].shape, generator=generator)) for level in levels]


def make(count: int = IMAGES) -> Prior:
    prior = Prior([Aggregated([TOP, BOTTOM], 3, images=count)])
    assert prior.wanted == count
    prior.see(0, [level[:4] for level in posteriors(count)], torch.arange(4) % 2)
    prior.see(4, [level[4:] for level in posteriors(count)], torch.arange(4, count) % 2)
    return prior


def mixture(images: list[int], z: list[Tensor], levels: int) -> Tensor:
    """-log of the mean of some images' densities, over the first levels."""
    each = []
    for image in images:
        density = torch.zeros(len(z[0]))
        for posterior, values in list(zip(posteriors(), z, strict=True))[:levels]:
            means, log_scales = posterior[image].chunk(2)
            density = density + torch.distributions.Normal(means, log_scales.exp()).log_prob(values).flatten(1).sum(1)
        each.append(density)
    return math.log(len(images)) - torch.stack(each).logsumexp(0)


def test_the_nats_are_those_of_the_mixture_level_by_level() -> None:
    prior, z = make(), draws(posteriors())
    for label, images in ((0, [0, 2, 4]), (1, [1, 3, 5]), (2, list(range(6))), (3, list(range(6)))):
        top, bottom = prior(z, torch.full((IMAGES,), label))
        torch.testing.assert_close(top, mixture(images, z, 1))
        torch.testing.assert_close(top + bottom, mixture(images, z, 2))


def test_two_networks_share_the_levels_as_one_does() -> None:
    apart = Prior([Aggregated([TOP], 3, images=IMAGES), Aggregated([BOTTOM], 3, [TOP], images=IMAGES)])
    apart.see(0, posteriors(), torch.arange(IMAGES) % 2)
    z, classes = draws(posteriors()), torch.tensor([0, 1, 2, 3, 0, 1])
    for one, other in zip(make()(z, classes), apart(z, classes), strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_drawn_latents_are_those_of_one_image() -> None:
    """With posteriors that are all but points, every sample is one image of its class, and all are drawn."""
    prior = Prior([Aggregated([TOP, BOTTOM], 3, images=IMAGES)])
    narrow = posteriors(scale=1e-4)
    prior.see(0, narrow, torch.arange(IMAGES) % 2)
    drawn = prior.generate(torch.tensor([1] * 60), list(range(60)), Sampling())
    means = one_row_each(narrow)[:, : TOP.values + BOTTOM.values]
    distances = torch.cdist(torch.cat([level.flatten(1) for level in drawn], dim=1), means)
    assert distances.amin(1).max() < 1e-2
    assert distances.argmin(1).unique().tolist() == [1, 3, 5]
    # What is known picks the image, in the same level and in the next.
    known = [torch.full((60, 2, 1, 1), math.nan), torch.full((60, 1, 2, 2), math.nan)]
    known[0][:, 0] = narrow[0][3, 0]
    picked = prior.generate(torch.tensor([1] * 60), list(range(60)), Sampling(), known)
    torch.testing.assert_close(picked[1], narrow[1][3, :1].expand(60, -1, -1, -1), atol=1e-2, rtol=0)


def test_no_more_images_are_kept_than_wanted() -> None:
    prior = make()
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    prior.see(IMAGES, posteriors(seed=9), torch.zeros(IMAGES, dtype=torch.int64))
    assert len(before) == 2
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())


def test_a_training_shows_the_first_images_and_refuses_too_few() -> None:
    """Images without a class count as of none."""
    levels, labels = posteriors(), torch.tensor([-1, 1, 0, 1, 0, 1])

    def batches() -> Iterator[dict[str, Tensor]]:
        for rows in (slice(0, 4), slice(4, 6)):
            yield {"label": labels[rows], "top": levels[0][rows], "bottom": levels[1][rows]}

    def kept(count: int) -> Aggregated:
        prior = Prior([Aggregated([TOP, BOTTOM], 3, images=count)])
        show_exemplars(prior, batches(), ["top", "bottom"])
        (network,) = prior.networks
        assert isinstance(network, Aggregated)
        return network

    assert kept(5).labels.tolist() == [3, 1, 0, 1, 0]
    assert torch.equal(kept(5).posteriors, one_row_each(levels)[:5])
    with pytest.raises(UserError, match="keeps 9 images, the training shards hold 6"):
        kept(9)
    show_exemplars(Prior([Normal([TOP], 3)]), iter(()), ["top"])  # wants none


@torch.no_grad()
def test_it_is_the_best_prior_of_its_images_and_overfits() -> None:
    """Of them the gap is 0 by definition. Of others it is worse than the standard normal, which has seen none."""
    prior = Prior([Aggregated([TOP, BOTTOM], 0, images=200)])
    seen, others = posteriors(200, scale=0.05), posteriors(200, seed=3, scale=0.05)
    prior.see(0, seen, torch.zeros(200, dtype=torch.int64))
    gaps = {}
    for name, levels in (("seen", seen), ("others", others)):
        z = draws(levels)
        flat = torch.cat([level.flatten(1) for level in z], dim=1)
        for kind, nats in (
            ("aggregated", torch.stack(prior(z, torch.zeros(200, dtype=torch.int64))).sum(0)),
            ("normal", normal_nats(flat).sum(1)),
        ):
            gaps[kind, name] = dissect_latents(one_row_each(levels), flat, nats).gap
    assert gaps["aggregated", "seen"] == pytest.approx(0, abs=1e-4)
    assert gaps["normal", "seen"] > 1
    assert gaps["aggregated", "others"] > gaps["normal", "others"] + 10
