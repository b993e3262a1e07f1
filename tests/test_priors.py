"""What every kind of network keeps to, alone and beside others."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks.machine import ROOT
from tests.recipes import tiny_recipe
from tests.test_flows import SECTIONS as CONTINUOUS
from vqscale.config.load import load_recipe
from vqscale.config.prior import Network as Sections
from vqscale.errors import UserError
from vqscale.models.generate import Draws, Sampling
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior
from vqscale.training.build import NETWORKS, build_prior, grid_shapes

GRIDS = (GridShape(2, 5), GridShape(4, 7))
CLASSES = 3
SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"layers": 2, "width": 16, "heads": 2},
    "pixelcnn": {"layers": 3, "width": 8},
    "recurrent": {"layers": 2, "width": 8},
    "masked": {"layers": 2, "width": 16, "heads": 2, "passes": 3},
    "blockwise": {"layers": 2, "width": 16, "heads": 2, "passes": 3},
    "uniform": {},
}
SECTIONS = {get_args(member)[0] for member in get_args(get_args(Sections)[0])}


def sections(*kinds: str) -> list[dict[str, Any]]:
    return [{"kind": kind, **SMALL[kind]} for kind in kinds]


def make(*kinds: str, wide: dict[str, Any] | None = None, **settings: Any) -> Prior:
    networks = [section | (wide or {} if section["kind"] != "uniform" else {}) for section in sections(*kinds)]
    recipe = tiny_recipe(prior__networks=networks, **settings)
    torch.manual_seed(0)
    prior = build_prior(recipe.prior, GRIDS, CLASSES).eval()
    for parameter in prior.parameters():  # the initial scale is too small to tell positions apart
        torch.nn.init.normal_(parameter, std=0.3)
    return prior


def sample_codes(batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(grid.codes, (batch, grid.side, grid.side), generator=generator) for grid in GRIDS]


every_kind = pytest.mark.parametrize(
    "kinds", [*((kind,) for kind in SMALL), *((kind, "transformer") for kind in SMALL), ("transformer", "uniform")]
)


def test_a_kind_is_one_section_and_one_network() -> None:
    assert len(SECTIONS) == len(NETWORKS)
    for section in SECTIONS:
        (kind,) = get_args(section.model_fields["kind"].annotation)
        taken = set(inspect.signature(NETWORKS[kind]).parameters) - {"grids", "classes", "given"}
        assert taken == set(section.model_fields) - {"kind", "levels", "size"}
        assert kind in (CONTINUOUS if section.continuous else SMALL) or section.ordered  # tests/test_dequantize.py


@every_kind
def test_the_levels_are_shared(kinds: tuple[str, ...]) -> None:
    prior = make(*kinds)
    assert prior.grids == GRIDS
    assert prior.length == 20
    given = [tuple(network.given) for network in prior.networks]  # type: ignore[arg-type]
    assert given == [GRIDS[: GRIDS.index(network.grids[0])] for network in prior.networks]  # type: ignore[index]


@every_kind
@torch.no_grad()
def test_a_sample_depends_on_its_seed_alone(kinds: tuple[str, ...]) -> None:
    prior, sampling = make(*kinds), Sampling(temperature=0.9, top_k=4, top_p=0.95, guidance=1.5)
    classes, seeds = torch.arange(64) % 4, list(range(64))
    together = prior.generate(classes, seeds, sampling)
    for some in (slice(5, 6), slice(9, 16)):
        apart = prior.generate(classes[some], seeds[some], sampling)
        assert all(torch.equal(one, all_[some]) for one, all_ in zip(apart, together, strict=True))
    for grid, codes in zip(GRIDS, together, strict=True):
        assert codes.dtype == torch.int64
        assert 0 <= codes.min() <= codes.max() < grid.codes
    assert len(together[1].flatten(1).unique(dim=0)) > 60


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("kinds", [("transformer",), ("masked", "blockwise")])
@torch.no_grad()
def test_a_gpu_draws_as_many_at_once_as_its_memory_holds(
    kinds: tuple[str, ...], guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior, sampling, classes, seeds = make(*kinds), Sampling(guidance=guidance), torch.arange(8) % 4, range(8)
    whole = prior.generate(classes, seeds, sampling)
    rows = max(network.row_bytes(torch.float32) for network in prior.networks)  # type: ignore[operator]
    batches: list[int] = []

    def watched(self: Prior, classes: Tensor, *rest: Any) -> list[Tensor]:
        batches.append(len(classes))
        return draw(self, classes, *rest)

    draw = Prior._draw
    monkeypatch.setattr(Prior, "_draw", watched)
    monkeypatch.setattr("vqscale.models.prior.free_memory", lambda device: 8 * rows)  # of which 0.8 are taken
    parts = prior.generate(classes, seeds, sampling)
    assert batches == ([6, 2] if guidance == 1 else [3, 3, 2])
    assert all(torch.equal(one, other) for one, other in zip(parts, whole, strict=True))
    monkeypatch.setattr("vqscale.models.prior.free_memory", lambda device: 1)
    assert len(prior.generate(classes[:2], seeds[:2], sampling)[0]) == 2, "one at a time at least"


def test_the_cache_of_the_imagenet_recipe_is_as_large_as_is_said() -> None:
    """In docs/sampling.md: 480 MiB a row in bf16, two rows an image, and 256 images at once."""
    recipe = load_recipe(ROOT / "pipelines/recipes/imagenet256.yaml")
    assert (recipe.sample.batch, recipe.sample.guidance, recipe.prior.training.precision) == (256, 1.5, "bf16")
    with torch.device("meta"):
        prior = build_prior(recipe.prior, grid_shapes(recipe.levels), 1000)
    (network,) = prior.networks
    assert network.row_bytes(torch.bfloat16) // 2**20 == 480  # type: ignore[operator]


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_drawing_as_a_gpu_does_after_training_in_bf16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most codes are those of fp32: rounding decides between codes that are nearly as likely."""
    training = {"prior__training__precision": "bf16"}
    prior, plain = make("transformer", kind, **training), make("transformer", kind)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (prior.drawing_dtype(gpu), prior.drawing_dtype(cpu)) == (torch.bfloat16, None)
    assert plain.drawing_dtype(gpu) is None
    classes, seeds = torch.arange(64) % 4, range(64)
    exact = plain.generate(classes, seeds, Sampling(guidance=1.5))
    assert all(map(torch.equal, prior.generate(classes, seeds, Sampling(guidance=1.5)), exact)), "on a CPU the same"
    monkeypatch.setattr(Prior, "drawing_dtype", lambda prior, device: torch.bfloat16)
    for codes, wanted in zip(prior.generate(classes, seeds, Sampling(guidance=1.5)), exact, strict=True):
        assert 0.8 < (codes == wanted).float().mean() <= 1


@every_kind
@torch.no_grad()
def test_guidance_of_one_is_none(kinds: tuple[str, ...]) -> None:
    """A scale beside 1 takes the way with two rows a sample, and comes to the codes of the way with one."""
    prior, classes, seeds = make(*kinds), torch.tensor([0, 1, 2]), [1, 2, 3]
    plain = prior.generate(classes, seeds, Sampling(guidance=1.0))
    nearly = prior.generate(classes, seeds, Sampling(guidance=1.0 + 1e-9))
    assert all(torch.equal(one, other) for one, other in zip(plain, nearly, strict=True))


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_logits_of_a_sample_are_those_of_any_batch_to_the_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding that differs would change the codes of one sample in some thousands."""
    prior = make("transformer", kind, wide={"width": 96})
    classes, seeds, sampling = torch.arange(64) % 4, list(range(64)), Sampling(guidance=1.5)
    guide, seen = Draws.guide, []

    def watch(self: Draws, logits: Tensor, scale: Tensor | None = None) -> Tensor:
        seen.append(guide(self, logits, scale))
        return seen[-1]

    monkeypatch.setattr(Draws, "guide", watch)
    prior.generate(classes, seeds, sampling)
    together, seen[:] = list(seen), []
    for some in (slice(5, 6), slice(9, 16)):
        prior.generate(classes[some], seeds[some], sampling)
        assert all(torch.equal(one, all_[some]) for one, all_ in zip(seen, together, strict=True))
        seen.clear()


@every_kind
@torch.no_grad()
def test_known_codes_stay(kinds: tuple[str, ...]) -> None:
    prior, classes, seeds = make(*kinds), torch.tensor([0, 1, 2]), [4, 5, 6]
    free = prior.generate(classes, seeds, Sampling())
    wanted = sample_codes(3, seed=8)
    half = [wanted[0], wanted[1].clone()]
    half[1][:, 2:] = -1
    kept = prior.generate(classes, seeds, Sampling(guidance=1.3), half)
    assert torch.equal(kept[0], wanted[0])
    assert torch.equal(kept[1][:, :2], wanted[1][:, :2])
    assert (kept[1][:, 2:] >= 0).all()
    # What is drawn anyway may as well be given: the numbers that other codes are drawn with stay the same.
    again = prior.generate(classes, seeds, Sampling(), [free[0], torch.full_like(free[1], -1)])
    assert all(torch.equal(one, other) for one, other in zip(again, free, strict=True))


@every_kind
@torch.no_grad()
def test_a_level_is_told_the_coarser_ones_and_not_the_finer(kinds: tuple[str, ...]) -> None:
    prior, codes, classes = make(*kinds), sample_codes(2), torch.tensor([0, 1])
    chance = torch.rand(2, prior.chances)
    before = prior(codes, classes, chance)
    assert [nats.shape for nats in before] == [(2,), (2,)]
    finer = prior([codes[0], (codes[1] + 1) % 7], classes, chance)
    coarser = prior([(codes[0] + 1) % 5, codes[1]], classes, chance)
    assert torch.equal(finer[0], before[0])
    learned = kinds[-1] != "uniform"
    assert torch.equal(finer[1], before[1]) != learned
    assert torch.equal(coarser[1], before[1]) != learned


@torch.no_grad()
def test_the_nats_are_those_of_a_distribution() -> None:
    """Over all codes of one cell, with all others fixed by a grid of one cell, the probabilities add up to one."""
    for kind in SMALL:
        recipe = tiny_recipe(prior__networks=[*sections("uniform"), *sections(kind)])
        torch.manual_seed(0)
        prior = build_prior(recipe.prior, (GridShape(1, 3), GridShape(1, 7)), CLASSES).eval()
        codes = [torch.full((7, 1, 1), 2), torch.arange(7).view(7, 1, 1)]
        nats = prior(codes, torch.full((7,), 1))
        assert torch.exp(-nats[1]).sum().item() == pytest.approx(1, abs=1e-5)
        assert nats[0].tolist() == pytest.approx([math.log(3)] * 7)


def test_label_smoothing_is_for_training_alone() -> None:
    plain, smooth = make("transformer"), make("transformer", prior__label_smoothing=0.2)
    codes, classes = sample_codes(2), torch.tensor([0, 1])
    assert torch.equal(plain(codes, classes)[1], smooth(codes, classes)[1])
    smooth.train()
    logits = plain.networks[0]([], codes, classes)[1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes[1].flatten(1), label_smoothing=0.2)
    assert smooth(codes, classes)[1].mean().item() / 16 == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"), [("S", 15), ("B", 93), ("L", 313), ("XL", 722), ("XXL", 1376), ("3B", 2984)]
)
def test_sizes_have_the_weights_that_are_documented(size: str, millions: int) -> None:
    """With the 5,120 codes of `imagenet256`, whose forward is followed without computing it."""
    recipe = load_recipe(
        ROOT / "pipelines/recipes/imagenet256.yaml", [f"prior.networks=[{{kind: transformer, size: {size}}}]"]
    )
    with torch.device("meta"):
        prior = build_prior(recipe.prior, grid_shapes(recipe.levels), 1000)
        codes = [torch.zeros(2, grid.side, grid.side, dtype=torch.int64) for grid in prior.grids]
        logits = prior.networks[0]([], codes, torch.zeros(2, dtype=torch.int64))
    assert [tuple(level.shape) for level in logits] == [(2, 1024, 512), (2, 4096, 512)]
    assert round(sum(parameter.numel() for parameter in prior.parameters()) / 1e6) == millions
    assert re.search(rf"\| {size} \([^)]*\) \| {millions:,} \|", (ROOT / "docs/priors.md").read_text())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"size": "B", "layers": 3}, "size B means layers 12, but layers is 3; leave one out"),
        ({"size": "huge"}, "networks.0.*size"),
        ({"heads": 4, "key_value_heads": 3}, "heads 4 is not divisible by key_value_heads 3"),
        ({"width": 36, "heads": 6, "positions": "rotary"}, "width 36 over heads 6 is not divisible by 4"),
        ({"kind": "blockwise", "order": "wave", "passes": 4}, "passes is for the order spread.*leave it out"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(network: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_recipe(prior__networks=[{"kind": "transformer", **network}])


def test_a_size_reads_back_as_it_was_written() -> None:
    recipe = tiny_recipe(prior__networks=[{"size": "B", "heads": 12}])
    network = recipe.prior.networks[0].model_dump()
    assert (network["layers"], network["width"], network["heads"]) == (12, 768, 12)
    assert tiny_recipe(prior__networks=[network]) == recipe
