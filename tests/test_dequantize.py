"""Dequantization: noise and its density, and the two bounds beside a probability that is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.recipes import tiny_recipe
from vqscale.data import clocks
from vqscale.errors import UserError
from vqscale.models.density import normal_nats
from vqscale.models.dequantize import HALF_RANGE, Dequantizer, UniformNoise, VariationalNoise, dequantized_nats
from vqscale.models.dequantized import Dequantized
from vqscale.models.generate import Sampling
from vqscale.models.network import GridShape
from vqscale.models.pixels import from_uint8
from vqscale.models.prior import Prior
from vqscale.models.raw_pixels import RawPixels

torch.set_num_threads(1)  # what is computed is small: more threads would wait for each other


def moved(channels: int = 1, side: int = 2, scale: float = 0.2) -> VariationalNoise:
    torch.manual_seed(0)
    noise = VariationalNoise(channels, side, couplings=4, width=8).double()
    for parameter in noise.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return noise


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, 1, 2, 2), generator=torch.Generator().manual_seed(seed)).double()


@torch.no_grad()
def test_variational_noise_begins_as_uniform_noise() -> None:
    torch.manual_seed(0)
    levels, normals = images(5), torch.randn(5, 1, 2, 2, dtype=torch.float64)
    plain, learned = UniformNoise(), VariationalNoise(1, 2, couplings=4, width=8).double()
    (u, nats), (v, others) = plain(levels, normals), learned(levels, normals)
    torch.testing.assert_close(u, v)
    torch.testing.assert_close(nats, others)
    assert not nats.any()
    assert 0 <= u.min() <= u.max() <= 1


def test_the_density_of_the_noise_is_that_of_its_jacobian() -> None:
    noise, levels = moved(), images(1)
    normals = torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, nats = noise(levels, normals)
    assert nats.abs().item() > 1e-2
    jacobian = torch.autograd.functional.jacobian(lambda values: noise(levels, values)[0], normals).view(4, 4)
    expected = normal_nats(normals).sum() + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(nats[0], expected)
    assert 0 <= u.min() <= u.max() <= 1


@torch.no_grad()
def test_the_noise_has_a_density_of_mass_one() -> None:
    """E_q[1 / q] is the volume where q is: 1, whatever it learned."""
    noise, generator = moved(scale=0.1), torch.Generator().manual_seed(0)
    normals = torch.randn(5_000, 1, 2, 2, dtype=torch.float64, generator=generator)
    _, nats = noise(images(1).expand(5_000, -1, -1, -1), normals)
    weights = nats.exp()
    error = weights.std().item() / math.sqrt(len(weights))
    assert error < 0.1
    assert weights.mean().item() == pytest.approx(1, abs=4 * error)


class Narrow:
    """A normal density narrower than a grey level, of which the bins' probabilities are known."""

    mean, scale = 100.5, 0.15

    def nats(self, values: Tensor) -> Tensor:
        """Of values in [-1, 1]."""
        return (normal_nats(((values + 1) * HALF_RANGE - self.mean) / self.scale)).flatten(1).sum(1) + values[
            0
        ].numel() * math.log(self.scale / HALF_RANGE)

    def truth(self, levels: Tensor) -> Tensor:
        """-log P(x) [B]."""
        high, low = ((levels + edge - self.mean) / self.scale for edge in (1, 0))
        return -torch.log(torch.special.ndtr(high) - torch.special.ndtr(low)).flatten(1).sum(1)


def bound(noise: Dequantizer, levels: Tensor, seed: int) -> tuple[float, float]:
    """Mean nats over the images, and the standard error."""
    normals = torch.randn(levels.shape, dtype=levels.dtype, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = dequantized_nats(noise, Narrow().nats, levels, normals)
    return found.mean().item(), found.std().item() / math.sqrt(len(found))


def test_learned_noise_closes_the_gap_that_uniform_noise_leaves() -> None:
    """P is known: uniform noise leaves a gap, which is a KL divergence, and learned noise closes most of it."""
    torch.manual_seed(0)
    levels = (Narrow.mean + Narrow.scale * torch.randn(1000, 1, 2, 2, dtype=torch.float64)).floor()
    truth = Narrow().truth(levels).mean().item()
    learned = VariationalNoise(1, 2, couplings=4, width=8).double()
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-2)
    for _ in range(100):
        batch = levels[torch.randint(len(levels), (64,))]
        loss = dequantized_nats(learned, Narrow().nats, batch, torch.randn_like(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (uniform, error), (variational, other) = bound(UniformNoise(), levels, 1), bound(learned, levels, 1)
    assert uniform - truth > 10 * error, "there is something to be won"
    assert variational > truth - 4 * other, "it is a bound"
    assert variational - truth < (uniform - truth) / 4


GRID = GridShape(8, 256)


def codes(first: int, count: int) -> Tensor:
    """Grey levels int64 [count, 8, 8] of clocks."""
    images, _ = clocks.draw(first, count, GRID.side, 0)
    return RawPixels(grey=True).encode(from_uint8(images, torch.device("cpu")))[0]


def trained(noise: str, steps: int) -> Prior:
    torch.manual_seed(0)
    network = Dequantized([GRID], 0, couplings=4, width=8, noise=noise, noise_couplings=2)
    prior, optimizer = Prior([network]), torch.optim.Adam(network.parameters(), lr=1e-2)
    images, generator = codes(0, 512), torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (32,), generator=generator)]
        chance = torch.rand(32, prior.chances, generator=generator)
        loss = prior([batch], torch.zeros(32, dtype=torch.int64), chance)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prior.eval()


def test_a_flow_on_images_and_its_variational_bound_is_at_least_the_uniform_one() -> None:
    """Held-out clocks, the same steps and noise: what is left of the gap is bits that the learned noise saves."""
    held_out, nothing = [codes(1000, 256)], torch.zeros(256, dtype=torch.int64)
    bits = {}
    for noise in ("uniform", "variational"):
        prior = trained(noise, 60)
        with torch.no_grad():
            nats = prior(held_out, nothing)[0]
            assert torch.equal(prior(held_out, nothing)[0], nats), "held-out figures repeat"
        bits[noise] = nats / GRID.values / math.log(2)
    saved = bits["uniform"] - bits["variational"]
    error = saved.std().item() / math.sqrt(len(saved))
    assert saved.mean().item() > -2 * error
    assert bits["uniform"].mean() < 7, "of 8"


@torch.no_grad()
def test_grey_levels_are_drawn_and_known_ones_stay() -> None:
    prior, none = trained("variational", 0), torch.zeros(40, dtype=torch.int64)
    (drawn,) = prior.generate(none, list(range(40)), Sampling())
    assert drawn.dtype == torch.int64
    assert (drawn.min(), drawn.max()) == (0, 255), "an untrained flow reaches over all bins"
    known = torch.full_like(drawn, -1)
    known[:, 0] = 7
    (kept,) = prior.generate(none, list(range(40)), Sampling(), [known])
    assert (kept[:, 0] == 7).all()
    assert torch.equal(kept[:, 1:], drawn[:, 1:])
    assert torch.equal(prior.generate(none[:1], [3], Sampling())[0], drawn[3:4])


@torch.no_grad()
def test_probabilities_of_a_single_pixel_add_up_to_those_of_the_density() -> None:
    """The mean over the noise of p(x + u) / q(u) is P(x); over all grey levels it is the mass that lies there."""
    torch.manual_seed(0)
    network = Dequantized([GridShape(1, 16)], 0, couplings=2, width=8, noise="variational", noise_couplings=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    values, draws = torch.arange(16).repeat_interleave(400).view(-1, 1, 1), 400
    chance = torch.rand(len(values), 1, generator=torch.Generator().manual_seed(0))
    (nats,) = network.nats([], [values], torch.zeros(len(values), dtype=torch.int64), chance, 0.0)
    edges = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    context = network.flow._context(torch.zeros(2, dtype=torch.int64), None)
    low, high = torch.special.ndtr(network.flow.to_noise(edges, context)[0]).flatten().tolist()
    assert torch.exp(-nats).sum().item() / draws == pytest.approx(high - low, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("noise", ["uniform", "variational"])
@pytest.mark.parametrize("chance", [0.0, 1 - 2**-24])
def test_the_outermost_uniform_numbers_give_finite_nats(noise: str, chance: float) -> None:
    """Of a step's numbers some are these: 3·32² pixels of 64 images have 1 - 2^-24 among them in 1.2 % of the steps."""
    prior = trained(noise, 0)
    (nats,) = prior([codes(0, 2)], torch.zeros(2, dtype=torch.int64), torch.full((2, prior.chances), chance))
    assert nats.isfinite().all()


def test_codes_without_an_order_are_refused() -> None:
    with pytest.raises(UserError, match=r"kind dequantized does not model codes without an order"):
        tiny_recipe(prior__networks=[{"kind": "dequantized"}])
