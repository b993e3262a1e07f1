"""The Gaussian VAE: its divergence, its bounds, its distributions of pixels, and the settings of its recipe."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.recipes import tiny_recipe, tiny_tree
from tests.training_helpers import forget_accelerate, one_process
from vqscale.config.load import parse
from vqscale.config.recipe import Recipe
from vqscale.data import clocks
from vqscale.data.codes import CodeBlock, read_code_shard, write_code_shard
from vqscale.data.manifest import CodeLevel
from vqscale.errors import UserError
from vqscale.models import bounds
from vqscale.models.autoregressive import AutoregressivePixels
from vqscale.models.latent_watch import divergence
from vqscale.models.latents import centres, draw
from vqscale.models.noise import uniforms_of
from vqscale.models.pixel_distributions import GaussianPixels, MixturePixels, PixelDistribution, log_probability
from vqscale.models.pixels import from_uint8
from vqscale.models.vae import VAE
from vqscale.training.build import build_tokenizer
from vqscale.training.steps import Steps
from vqscale.training.tasks import tokenizer_task
from vqscale.training.transfer import DeviceBatch

SIDE = 16


def vae(**settings: Any) -> dict[str, Any]:
    """Overrides of the tiny recipe; keywords are settings of the tokenizer."""
    levels = [{"name": "bottom", "downsample": 4, "channels": 3}, {"name": "top", "downsample": 2, "channels": 2}]
    sizes = {"hidden": 16, "residual_blocks": 1, "residual_hidden": 8}
    training = tiny_tree()["tokenizer"]["training"]
    return {
        "tokenizer": {"kind": "vae", "levels": levels, **sizes, "training": training} | settings,
        "prior__networks": [{"kind": "normal"}],
    }


def network(seed: int = 0, **settings: Any) -> VAE:
    torch.manual_seed(seed)
    built = build_tokenizer(tiny_recipe(**vae(**settings)).tokenizer)
    assert isinstance(built, VAE)
    return built


def images(count: int = 4) -> Tensor:
    return from_uint8(clocks.draw(0, count, SIDE, 0)[0], torch.device("cpu"))


VALUES = 3 * 4 * 4 + 2 * 2 * 2


def posterior(count: int = 2) -> Tensor:
    return 0.4 * torch.randn(count, 6, 2, 2, generator=torch.Generator().manual_seed(0))


def test_the_divergence_is_that_of_many_draws() -> None:
    q = posterior(1)
    many = q.expand(200_000, -1, -1, -1)
    drawn = draw([many], torch.randn(200_000, 12, generator=torch.Generator().manual_seed(1)))
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(drawn.latents[0]).flatten(1).sum(1)
    terms = drawn.log_density - standard
    error = float(terms.std()) / math.sqrt(len(terms))
    assert abs(float(terms.mean() - divergence(q).sum())) < 4 * error
    assert error < 0.02
    assert divergence(q).shape == (1, 3)


def test_one_weight_is_the_bound_and_more_make_it_no_looser() -> None:
    """IWAE-1 is the ELBO of the same draw, with its divergence by that draw; over many draws both have one mean."""
    model, pixels = network(likelihood={"kind": "gaussian", "scale": 30.0}), images(2)
    noise = torch.randn(2, 512, VALUES, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        terms = model(pixels, noise)
        one = bounds.iwae(terms.likelihood[:1], terms.ratio[:1])
        torch.testing.assert_close(one, terms.likelihood[0] + terms.ratio[0])
        closed = bounds.elbo(terms, [divergence(q) for q in terms.posteriors])
        by_draws = terms.likelihood + terms.ratio
        error = by_draws.std(dim=0) / math.sqrt(512)
        # The closed form's own error is that of the mean of the likelihood alone.
        assert ((by_draws.mean(dim=0) - closed).abs() < 5 * error).all()
        means = []
        for count in (1, 4, 16, 64):
            groups = zip(terms.likelihood.split(count), terms.ratio.split(count), strict=True)
            means.append(torch.stack([bounds.iwae(*group) for group in groups]).mean())
    assert all(after > before for before, after in itertools.pairwise(means))


def test_free_bits_hold_what_lies_below() -> None:
    divergences = torch.tensor([0.5, 3.0], requires_grad=True)
    kept = bounds.free_bits(divergences, torch.tensor([0.4, 2.5]), 1.0)
    assert kept.tolist() == [1.0, 3.0]
    kept.sum().backward()
    assert divergences.grad is not None
    assert divergences.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("family", ["logistic", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_probabilities_vanish(family: Any, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, 1.0, 127.0, 254.0, 255.0], dtype=dtype)[:, None, None]
    means = torch.tensor([-2000.0, -1.0, 0.0, 128.0, 255.0, 3000.0], dtype=dtype)[:, None].requires_grad_()
    scale = torch.tensor([0.1, 1.0, 40.0, 900.0], dtype=dtype, requires_grad=True)
    found = log_probability(family, values, means, scale)
    found.sum().backward()
    assert found.isfinite().all()
    assert (found <= 0).all()
    for tensor in (means, scale):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def logistic(value: int, mean: float, scale: float) -> float:
    def cumulative(x: float) -> float:
        return 1 / (1 + math.exp(-(x - mean) / scale))

    low = 0.0 if value == 0 else cumulative(value - 0.5)
    return (1.0 if value == 255 else cumulative(value + 0.5)) - low


def test_the_mixture_is_that_of_pixelcnn_plus_plus() -> None:
    """Pixel by pixel in plain floats; its probabilities of blue add up to one, given red and green."""
    mixture, generator = MixturePixels(2), torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 20, 1, 1, generator=generator) * 0.5
    raw = outputs.view(2, 10).double()
    weights = raw[:, 0].softmax(0)

    def plain(pixel: tuple[int, int, int], components: Any = (0, 1)) -> float:
        x = [value / 127.5 - 1 for value in pixel]
        total = 0.0
        for m in components:
            means, scales, shift = raw[m, 1:4], raw[m, 4:7].exp() * 127.5, raw[m, 7:10].tanh()
            centres = [means[0], means[1] + shift[0] * x[0], means[2] + shift[1] * x[0] + shift[2] * x[1]]
            each = [logistic(v, float(c + 1) * 127.5, float(s)) for v, c, s in zip(pixel, centres, scales, strict=True)]
            total += float(weights[m]) * math.prod(each)
        return total

    pixels = [(0, 3, 255), (100, 127, 200), (255, 0, 0)]
    batch = from_uint8(np.array(pixels, np.uint8).reshape(-1, 1, 1, 3), torch.device("cpu"))
    found = mixture.log_likelihood(batch, outputs.expand(len(pixels), -1, -1, -1))
    assert found.tolist() == pytest.approx([math.log(plain(pixel)) for pixel in pixels], rel=1e-4)
    blues = np.array([(90, 30, blue) for blue in range(256)], np.uint8).reshape(-1, 1, 1, 3)
    of_blue = mixture.log_likelihood(from_uint8(blues, torch.device("cpu")), outputs.expand(256, -1, -1, -1))
    without = sum(plain((90, 30, blue)) for blue in range(256))
    assert float(of_blue.double().exp().sum()) == pytest.approx(without, rel=1e-4)


@pytest.mark.parametrize("distribution", [GaussianPixels(), GaussianPixels(20.0), MixturePixels(3)])
def test_means_lie_where_pixels_are_likeliest(distribution: PixelDistribution) -> None:
    """Trained on one image alone, a decoder's outputs give that image back."""
    target = from_uint8(np.full((1, 2, 2, 3), (40, 90, 200), np.uint8), torch.device("cpu"))
    outputs = torch.zeros(1, distribution.channels, 2, 2, requires_grad=True)
    optimizer = torch.optim.Adam([outputs, *distribution.parameters()], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (-distribution.log_likelihood(target, outputs)).sum().backward()
        optimizer.step()
    assert (distribution.images(outputs, []) - target).abs().max() < 0.05


def test_no_pixel_of_an_autoregressive_decoder_sees_the_future() -> None:
    torch.manual_seed(0)
    decoder, pixels, told = AutoregressivePixels(2, 3, 8, 3), images(1), torch.randn(1, 8, SIDE, SIDE)
    before = decoder.parameters_of(pixels, told)
    for y, x in ((0, 0), (3, 5), (15, 14)):
        changed = pixels.clone()
        changed[..., y, x] += 0.5
        moved = (decoder.parameters_of(changed, told) != before).any(dim=1)[0].flatten()
        place = y * SIDE + x
        assert not moved[: place + 1].any()
        assert moved[place + 1 :].any()


def test_an_autoregressive_decoder_draws_by_its_own_distribution() -> None:
    """By steps as by the whole forward: every pixel is what its mixture, given those before, makes of its numbers."""
    torch.manual_seed(0)
    decoder, told, latents = AutoregressivePixels(2, 2, 8, 3), torch.randn(2, 8, 6, 6), [torch.randn(2, 3, 2, 2)]
    drawn = decoder.images(told, latents)
    uniforms = uniforms_of(latents[0].numpy(), 4 * 36).view(2, 36, 4)
    mixtures = decoder.parameters_of(drawn, told).flatten(2)
    again = torch.stack([decoder.mixture.draw(mixtures[..., n], uniforms[:, n]) for n in range(36)], dim=2)
    assert ((again - drawn.flatten(2)).abs() > 1e-5).float().mean() < 0.02, (
        "but where rounding meets the edge of a level"
    )
    assert drawn.unique().numel() > 20
    alone = decoder.images(told[1:], [latents[0][1:]])
    torch.testing.assert_close(alone, drawn[1:])


def test_draws_of_the_mixture_have_its_probabilities() -> None:
    mixture, outputs = MixturePixels(2), torch.randn(1, 20, generator=torch.Generator().manual_seed(3))
    outputs[:, [4, 5, 6, 14, 15, 16]] -= 4  # narrow, so that few grey levels hold most of the mass
    count = 200_000
    uniforms = torch.rand(count, 4, generator=torch.Generator().manual_seed(4))
    red = ((mixture.draw(outputs.expand(count, -1), uniforms)[:, 0] + 1) * 127.5).round().long()
    found = torch.bincount(red, minlength=256) / count
    raw = outputs.view(2, 10).double()
    parts = zip(raw[:, 0].softmax(0), raw[:, 1], raw[:, 4].exp(), strict=True)
    expected = sum(
        float(weight) * torch.tensor([logistic(v, float(mean + 1) * 127.5, float(scale) * 127.5) for v in range(256)])
        for weight, mean, scale in parts
    )
    assert (found - expected).abs().max() < 5e-3


def test_latents_are_drawn_from_their_posteriors() -> None:
    codes, q = torch.tensor([[[3]], [[5]]], dtype=torch.uint16), posterior()
    drawn = draw([codes], torch.empty(2, 0))
    assert (drawn.latents[0].dtype, drawn.latents[0].flatten().tolist()) == (torch.int64, [3, 5])
    assert drawn.log_density.tolist() == [0.0, 0.0]
    noise = torch.randn(2, 12)
    drawn = draw([q], noise)
    mean, log_std = q.chunk(2, dim=1)
    torch.testing.assert_close(drawn.latents[0], mean + log_std.exp() * noise.view(2, 3, 2, 2))
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(drawn.latents[0]).flatten(1).sum(1)
    torch.testing.assert_close(drawn.log_density, expected)
    torch.testing.assert_close(centres([q])[0], mean)


def test_the_lower_level_is_told_of_the_upper_one_by_its_mean() -> None:
    model, pixels = network(), images()
    bottom, top = model.encode(pixels)
    assert (bottom.shape, top.shape) == ((4, 6, 4, 4), (4, 4, 2, 2))
    with torch.no_grad():
        model.posteriors[1].bias[:2] += 1.0  # type: ignore[union-attr, operator, index]
    moved, above = model.encode(pixels)
    torch.testing.assert_close(above[:, :2], top[:, :2] + 1)
    assert (moved != bottom).any()
    model.posteriors[1].bias.data[2:] += 1.0  # type: ignore[union-attr, index]
    torch.testing.assert_close(model.encode(pixels)[0], moved)


def test_posteriors_go_through_shards(tmp_path: Path) -> None:
    level = CodeLevel(name="top", grid=2, channels=3)
    assert (level.sample, level.dtype, str(level)) == ((6, 2, 2), "float32", "top 2×2 of 3 channels")
    array = np.random.default_rng(0).normal(size=(5, 6, 2, 2)).astype(np.float32)
    blocks = [CodeBlock({"top": array}, np.arange(5), [f"k{number}" for number in range(5)])]
    write_code_shard(f"{tmp_path}/a.tar", blocks, [level], "f")
    found = read_code_shard(f"{tmp_path}/a.tar")
    np.testing.assert_array_equal(found["top"], array)
    assert found["top"].dtype == np.float32
    array[2, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="posteriors of top are not finite"):
        write_code_shard(f"{tmp_path}/b.tar", blocks, [level], "f")


def test_of_codes_nothing_else_is_written_than_before() -> None:
    level = CodeLevel(name="top", grid=2, codes=16)
    assert json.loads(level.model_dump_json()) == {"name": "top", "grid": 2, "codes": 16}
    for wrong in ({"codes": 1}, {"codes": 0}, {"codes": 4, "channels": 2}):
        with pytest.raises(ValueError, match="level 'top' has"):
            CodeLevel(name="top", grid=2, **wrong)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "iwae", "beta": 2.0}, "objective iwae weights by importance, which beta would bend"),
        ({"objective": "iwae", "free_bits": 1.0}, "which free_bits would bend"),
        (
            {"likelihood": {"kind": "mixtures"}},
            "'tokenizer.likelihood.kind' is 'mixtures'; use 'gaussian', 'mixture'",
        ),
        ({"likelihood": {"scale": 0}}, "'tokenizer.likelihood.scale' is 0"),
        ({"quantizer": {}}, "unknown key 'tokenizer.quantizer'"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_recipe(**vae(**settings))
    assert expected in str(caught.value)


def test_a_prior_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"prior.networks.0.kind transformer does not model continuous.*use normal"):
        tiny_recipe(**vae() | {"prior__networks": [{"layers": 1}]})
    with pytest.raises(UserError, match=r"kind normal does not model codes, which tokenizer.kind vqvae2 has; use tra"):
        parse(Recipe, tiny_tree(prior__networks=[{"kind": "normal"}]), "r.yaml")


def test_a_step_that_is_not_taken_leaves_the_figures_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of the last batch that was learned from, over all ranks: none of images that were left out."""
    pixels = torch.from_numpy(clocks.draw(0, 8, SIDE, 0)[0])
    with one_process(monkeypatch) as ranks:
        torch.manual_seed(0)
        task = tokenizer_task(tiny_recipe(**vae()), ranks, list, pixels[:1].numpy())
        steps = Steps(task)
        steps.take(DeviceBatch(0, {"image": pixels}, torch.arange(8)), spoil=True)
        assert task.figures().keys() == {"kl_weight"}, "nothing is known yet, of collapse least of all"
        steps.take(DeviceBatch(0, {"image": pixels}, torch.arange(8)))
        known = task.figures()
        assert known["top/kl"] > 0
        steps.take(DeviceBatch(1, {"image": pixels * 0}, torch.arange(8)), spoil=True)
        assert steps.skipped == 2
        assert task.figures() == known
        steps.take(DeviceBatch(2, {"image": pixels}, torch.arange(8)))
        assert task.figures() != known


def test_the_warm_up_of_the_importance_weighted_bound_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tempered in it, though what is reported is the bound; behind it what is minimised is the bound itself."""
    pixels = torch.from_numpy(clocks.draw(0, 8, SIDE, 0)[0])
    with one_process(monkeypatch) as ranks:
        torch.manual_seed(0)
        settings = tiny_recipe(**vae(objective="iwae", samples=3, kl_warmup=4))
        task = tokenizer_task(settings, ranks, list, pixels[:1].numpy())
        for step in range(6):
            batch = DeviceBatch(step, {"image": pixels}, torch.arange(8))
            task.before_step(batch)
            found = {name: float(value.detach()) for name, value in task.losses(batch).items()}
            same = found["total"] == pytest.approx(found["bits_per_dim"] * math.log(2), rel=1e-6)
            assert same == (step >= 4), step


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 3.0},
        {"kl_warmup": 50},
        {"free_bits": 5.0},
        {"objective": "iwae", "samples": 4},
        {"samples": 4},
        {"likelihood": {"kind": "gaussian", "scale": 9.0}},
        {"likelihood": {"kind": "mixture"}},
        {"likelihood": {"kind": "autoregressive", "layers": 1, "width": 8}},
        {"levels": [{"name": "only", "downsample": 4, "channels": 2}]},
    ],
)
def test_every_setting_acts(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the loss of the third step, behind two whose divergences free bits go by."""
    pixels = clocks.draw(0, 8, SIDE, 0)[0]
    found = []
    with one_process(monkeypatch) as ranks:
        for settings in ({}, change):
            torch.manual_seed(0)
            task = tokenizer_task(tiny_recipe(**vae(**settings)), ranks, list, pixels[:1])
            steps = Steps(task)
            for step in range(3):
                steps.take(DeviceBatch(step, {"image": torch.from_numpy(pixels)}, torch.arange(8)))
            found.append(float(steps.losses["total"]))
            forget_accelerate()
    assert found[0] != found[1]
