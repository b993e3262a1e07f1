"""Networks over continuous latents: that they are densities, that they invert, and what they are told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.recipes import tiny_recipe
from vqscale.config.prior import (
    AggregatedNetwork,
    IAFNetwork,
    MAFNetwork,
    NetworkSection,
    NormalNetwork,
    RealNVPNetwork,
)
from vqscale.models.density import Flow, Normal, normal_nats
from vqscale.models.generate import Draws, Sampling
from vqscale.models.iaf import IAF, inverted
from vqscale.models.maf import MAF, Autoregression
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior
from vqscale.models.realnvp import Coupling, RealNVP, kept_parts
from vqscale.training.build import build_prior

torch.set_num_threads(1)  # what is computed is small: more threads would wait for each other
GRIDS = (GridShape(2, 0, 3), GridShape(4, 0, 2))
CLASSES = 3
SECTIONS: dict[str, NetworkSection] = {
    "normal": NormalNetwork(kind="normal"),
    "realnvp": RealNVPNetwork(kind="realnvp", couplings=5, width=16),
    "maf": MAFNetwork(kind="maf", maps=3, layers=2, width=16),
    "iaf": IAFNetwork(kind="iaf", maps=3, layers=2, width=16),
    "aggregated": AggregatedNetwork(kind="aggregated", images=20),
}
FLOWS = ["realnvp", "maf", "iaf"]


def make(kind: str, grids: tuple[GridShape, ...] = GRIDS, scale: float = 0.15, **sizes: Any) -> Prior:
    section = SECTIONS[kind].model_copy(update=sizes)
    settings = tiny_recipe().prior.model_copy(update={"networks": [section]})
    torch.manual_seed(0)
    prior = build_prior(settings, grids, CLASSES).eval()
    for parameter in prior.parameters() if scale else ():  # a flow begins as the identity
        torch.nn.init.normal_(parameter, std=scale)
    if scale:
        posteriors = [torch.cat([z, 0.1 * z], dim=1) for z in latents(prior.wanted, grids, seed=5)]
        prior.see(0, posteriors, torch.arange(prior.wanted) % CLASSES)
    return prior


def flow(prior: Prior, level: int) -> Flow:
    network = prior.networks[level]
    assert isinstance(network, Flow)
    return network


def latents(batch: int, grids: tuple[GridShape, ...] = GRIDS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, grid.channels, grid.side, grid.side, generator=generator) for grid in grids]


every_kind = pytest.mark.parametrize("kind", SECTIONS)
every_flow = pytest.mark.parametrize("kind", FLOWS)


@every_kind
@torch.no_grad()
def test_an_untrained_network_is_the_standard_normal(kind: str) -> None:
    prior, z = make(kind, scale=0.0), latents(4)
    for level, nats in zip(z, prior(z, torch.tensor([0, 1, 2, 3])), strict=True):
        expected = -torch.distributions.Normal(0, 1).log_prob(level).flatten(1).sum(1)
        torch.testing.assert_close(nats, expected)


@every_flow
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_a_flow_inverts(kind: str, dtype: torch.dtype, close: float) -> None:
    """The way back is computed by other means: by layers whose rows are steady, and for MAF cell by cell."""
    prior = make(kind).to(dtype)
    z, classes = [level.to(dtype) for level in latents(7)], torch.arange(7) % 4
    for number, level in enumerate(z):
        network = flow(prior, number)
        condition = network.condition(z[:number]) if network.condition else None
        context = network._context(classes, condition)
        u, _ = network.to_noise(level, context)
        assert (u - level).abs().max() > 0.1, "it is not the identity"
        torch.testing.assert_close(network.from_noise(u, context), level, rtol=0, atol=close)
        back, _ = network.to_noise(network.from_noise(level, context), context)
        torch.testing.assert_close(back, level, rtol=0, atol=close)


@every_flow
@pytest.mark.parametrize("grid", [*GRIDS, GridShape(1, 0, 3), GridShape(3, 0, 1), GridShape(1, 0, 1)])
def test_the_log_determinant_is_that_of_the_jacobian(kind: str, grid: GridShape) -> None:
    network = flow(make(kind, (grid,)).double(), 0)
    (z,) = (level.double() for level in latents(3, (grid,)))
    context = network._context(torch.tensor([0, 1, 3]), None)
    _, found = network.to_noise(z, context)
    assert found.abs().min() > 1e-3
    for one, told, log_determinant in zip(z, context, found, strict=True):

        def to_noise(values: Tensor, told: Tensor = told) -> Tensor:
            return network.to_noise(values[None], told[None])[0][0]

        jacobian = torch.autograd.functional.jacobian(to_noise, one).view(grid.values, grid.values)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_determinant, rtol=0, atol=1e-10)


@every_kind
@torch.no_grad()
def test_the_density_integrates_to_one(kind: str) -> None:
    """Over one value, and over two of one cell, on a lattice that reaches far enough."""
    for grid, count, close in ((GridShape(1, 0, 1), 1201, 1e-5), (GridShape(1, 0, 2), 201, 1e-3)):
        places = torch.linspace(-12, 12, count, dtype=torch.float64)
        points = torch.cartesian_prod(*[places] * grid.channels).view(-1, grid.channels, 1, 1)
        (nats,) = make(kind, (grid,)).double()([points], torch.ones(len(points), dtype=torch.int64))
        mass = torch.exp(-nats).sum() * float(places[1] - places[0]) ** grid.channels
        assert mass.item() == pytest.approx(1, abs=close)


@torch.no_grad()
def test_a_map_of_maf_sees_nothing_that_follows() -> None:
    """Raster order, then channels; every value that comes before is seen in one way or another."""
    channels, side = 3, 4
    count = channels * side**2
    torch.manual_seed(0)
    one = Autoregression(channels, layers=4, width=16, kernel=3).eval()
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    z, context = torch.randn(1, side, side, channels), torch.randn(1, 16, side, side)

    def inside(values: Tensor) -> Tensor:
        """What each value is scaled and shifted by: [n, count, 2], values [n, side, side, channels]."""
        ordered = values.permute(0, 3, 1, 2)
        told = context.expand(len(values), -1, -1, -1)
        vertical = one.embed(ordered)
        horizontal = torch.nn.functional.pad(vertical, (1, 0, 0, 0))[..., :-1]
        for layer in one.layers:
            vertical, horizontal = layer(vertical, horizontal, told)
        found = one.within(horizontal, ordered).unflatten(1, (2, channels))
        return found.permute(0, 3, 4, 2, 1).reshape(len(values), count, 2)

    moved = z.repeat(count, 1, 1, 1)
    moved.view(count, count).diagonal().add_(1.0)
    changed = (inside(moved) - inside(z)).abs().amax(2) > 1e-6  # [value that was moved, value that is scaled]
    assert not changed.tril().any()
    assert changed[:-1].any(1).all()
    assert changed.diagonal(1).all(), "the value just before is always seen"


@pytest.mark.parametrize("grid", [GridShape(2, 0, 2), GridShape(3, 0, 2)])
def test_drawing_by_an_iaf_sees_no_noise_that_follows_and_takes_one_forward_a_map(grid: GridShape) -> None:
    """One map, so that nothing is read backwards: a value follows from its own noise and that before it."""
    network = flow(make("iaf", (grid,), maps=1), 0).double()
    context, calls = network._context(torch.tensor([1]), None), []
    network.maps[0].register_forward_hook(lambda *given: calls.append(given))
    u = torch.randn(1, grid.channels, grid.side, grid.side, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda u: network.from_noise(u, context), u)
    order = torch.arange(grid.values).view(grid.channels, -1).T.flatten()  # raster order, then channels
    matrix = jacobian.view(grid.values, grid.values)[order][:, order]
    assert not matrix.triu(1).any()
    assert (matrix.diagonal() > 0).all()
    assert matrix.tril(-1).abs().amax() > 1e-3
    assert len(calls) == 1


def test_gradients_of_an_inverted_map_are_those_of_unrolling_it() -> None:
    """The implicit gradient of values, context and weights, beside autograd through all rounds."""
    torch.manual_seed(0)
    one = Autoregression(2, layers=1, width=8, kernel=3).double()
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    context, weights = torch.randn(3, 8, 3, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, 3, 3)
    u = z
    for _ in range(18):
        log_scale, shift = one.changes(u, context)
        u = (z - shift) * (-log_scale).exp()
    found = inverted(one, z, context)
    torch.testing.assert_close(found, u)
    given = [z, context, *one.parameters()]
    implicit, unrolled = (torch.autograd.grad((own * weights).sum(), given) for own in (found, u))
    torch.testing.assert_close(implicit, unrolled, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in implicit)


@torch.no_grad()
def test_a_coupling_keeps_what_it_keeps_and_every_part_has_its_turn() -> None:
    (grid,) = (GridShape(4, 0, 3),)
    parts = kept_parts(grid)
    assert len(parts) == 4
    torch.manual_seed(0)
    z, context = torch.randn(2, 3, 4, 4), torch.randn(2, 8, 4, 4)
    for kept in parts:
        coupling = Coupling(kept, 8)
        torch.nn.init.normal_(coupling.last.weight, std=0.3)
        u, _ = coupling(z, context)
        assert torch.equal(u[:, kept], z[:, kept])
        assert (u[:, ~kept] != z[:, ~kept]).all()
    assert (parts[0] ^ parts[1]).all()
    assert (parts[2] ^ parts[3]).all()


@every_kind
@torch.no_grad()
def test_a_level_is_told_the_coarser_ones_and_not_the_finer(kind: str) -> None:
    prior, z, classes = make(kind), latents(2), torch.tensor([0, 1])
    before = prior(z, classes)
    finer, coarser = prior([z[0], z[1] + 1], classes), prior([z[0] + 1, z[1]], classes)
    assert torch.equal(finer[0], before[0])
    assert torch.equal(coarser[1], before[1]) == (kind == "normal")
    assert torch.equal(prior(z, classes + 1)[0], before[0]) == (kind == "normal")


@every_kind
@torch.no_grad()
def test_a_sample_depends_on_its_seed_alone(kind: str) -> None:
    prior, sampling = make(kind), Sampling(temperature=0.9, top_k=4, top_p=0.95, guidance=1.5)
    classes, seeds = torch.arange(64) % 4, list(range(64))
    together = prior.generate(classes, seeds, sampling)
    for some in (slice(5, 6), slice(9, 16)):
        apart = prior.generate(classes[some], seeds[some], sampling)
        assert all(torch.equal(one, all_[some]) for one, all_ in zip(apart, together, strict=True))
    for grid, level in zip(GRIDS, together, strict=True):
        assert level.dtype == torch.float32
        assert level.shape == (64, grid.channels, grid.side, grid.side)
        assert level.isfinite().all()
        assert len(level.flatten(1).unique(dim=0)) == 64


@every_kind
@torch.no_grad()
def test_known_latents_stay_and_change_no_other_draw(kind: str) -> None:
    prior, classes, seeds = make(kind), torch.tensor([0, 1, 2]), [4, 5, 6]
    free = prior.generate(classes, seeds, Sampling())
    half = [torch.full_like(level, math.nan) for level in free]
    half[0], half[1][:, :, :2] = free[0], 7.0
    kept = prior.generate(classes, seeds, Sampling(), half)
    assert torch.equal(kept[0], free[0])
    assert (kept[1][:, :, :2] == 7).all()
    if kind != "aggregated":  # what is known says which images come into question
        assert torch.equal(kept[1][:, :, 2:], free[1][:, :, 2:])


@every_flow
@torch.no_grad()
def test_what_is_drawn_has_the_density_that_is_said(kind: str) -> None:
    """Drawn latents go to the noise that they were drawn from, so mean nats are those of the noise and its volume."""
    prior, seeds = make(kind), list(range(500))
    classes = torch.arange(500) % 4
    z = prior.generate(classes, seeds, Sampling())
    network = flow(prior, 0)
    u, log_determinant = network.to_noise(z[0], network._context(classes, None))
    draws = Draws(Sampling(), seeds, u.device)
    torch.testing.assert_close(u.double().flatten(1), draws.normals(12), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prior(z, classes)[0], normal_nats(u).flatten(1).sum(1) - log_determinant)


@torch.no_grad()
def test_temperature_scales_the_noise() -> None:
    (normal,) = make("normal", GRIDS[:1]).networks
    assert isinstance(normal, Normal)
    nothing = [torch.full((2, 3, 2, 2), math.nan)]
    cold, warm = (
        normal.sample([], torch.tensor([0, 0]), Draws(Sampling(temperature=t), [1, 2], torch.device("cpu")), nothing)[0]
        for t in (0.5, 1.0)
    )
    torch.testing.assert_close(cold, warm / 2)


@every_flow
def test_a_flow_learns_what_is_not_normal(kind: str) -> None:
    """The second value follows the square of the first: uncorrelated, so that no normal distribution sees it."""
    torch.manual_seed(0)
    grid, spread = GridShape(1, 0, 2), 0.3
    network: Flow = RealNVP([grid], 1, couplings=4, width=16)
    if kind != "realnvp":
        network = {"maf": MAF, "iaf": IAF}[kind]([grid], 1, maps=2, layers=1, width=16, kernel=3)
    prior, optimizer = Prior([network]), torch.optim.Adam(network.parameters(), lr=1e-2)

    def bow(count: int) -> Tensor:
        first, noise = torch.randn(2, count)
        return torch.stack([first, first.square() - 1 + spread * noise], dim=1)[:, :, None, None]

    for _ in range(100):
        loss = prior([bow(256)], torch.zeros(256, dtype=torch.int64))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    truth = math.log(2 * math.pi * math.e) + math.log(spread)
    best_normal = math.log(2 * math.pi * math.e) + math.log(2 + spread**2) / 2
    with torch.no_grad():
        found = prior([bow(4000)], torch.zeros(4000, dtype=torch.int64))[0].mean().item()
    assert truth - 0.1 < found < best_normal - 0.6 * (best_normal - truth)
