import pytest
import torch
from torch import Tensor

from vqscale.models.generate import Sampling, draw
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior
from vqscale.models.transformer import Transformer

GRIDS = (GridShape(2, 5), GridShape(4, 7))


def make(classes: int = 3) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(GRIDS, classes, layers=2, width=16, heads=2).eval()
    for parameter in model.parameters():  # the initial scale is too small to tell positions apart
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def sample_codes(batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(grid.codes, (batch, grid.side, grid.side), generator=generator) for grid in GRIDS]


@torch.no_grad()
def test_no_position_sees_itself_or_the_future() -> None:
    model, codes, classes = make(), sample_codes(1), torch.tensor([1])
    before = torch.cat([logits.flatten() for logits in model([], codes, classes)])
    starts, total = [], 0
    for logits in model([], codes, classes):
        starts += [total + i * logits.shape[2] for i in range(logits.shape[1])]
        total += logits.numel()
    for position in range(model.length):
        level, cell = model.locate(position)
        changed = [grid.clone() for grid in codes]
        flat = changed[level].view(-1)
        flat[cell] = (flat[cell] + 1) % GRIDS[level].codes
        after = torch.cat([logits.flatten() for logits in model([], changed, classes)])
        first = (before != after).nonzero().min().item() if not torch.equal(before, after) else total
        assert first >= (starts[position + 1] if position + 1 < len(starts) else total)
        assert position == model.length - 1 or first < total  # and it does reach what follows


@torch.no_grad()
def test_cached_steps_equal_the_full_forward() -> None:
    model, codes, classes = make(), sample_codes(4), torch.tensor([0, 1, 2, 3])
    full = model([], codes, classes)
    flat = [grid.flatten(1) for grid in codes]
    caches = model.caches(4, model.class_token.weight)
    for position in range(model.length):
        level, cell = model.locate(position)
        step = model.step(position, classes, flat, caches)
        torch.testing.assert_close(step, full[level][:, cell], atol=1e-5, rtol=1e-5)


def test_a_fine_cell_is_told_the_coarse_code_over_it() -> None:
    assert make()._parent_cell(1).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


def test_same_seed_same_sample_in_any_batch() -> None:
    model, sampling = make(), Sampling(temperature=0.9, top_k=4, top_p=0.95, guidance=1.5)
    classes, seeds = torch.tensor([0, 1, 2, 0, 1, 2, 0]), list(range(7))
    together = Prior([model]).generate(classes, seeds, sampling)
    for i in (0, 3, 6):
        alone = Prior([model]).generate(classes[i : i + 1], seeds[i : i + 1], sampling)
        assert all(torch.equal(a[0], t[i]) for a, t in zip(alone, together, strict=True))


def test_guidance_one_is_none_and_zero_forgets_the_class() -> None:
    model, classes, seeds = make(), torch.tensor([0, 2]), [1, 2]
    plain = Prior([model]).generate(classes, seeds, Sampling())
    nearly = Prior([model]).generate(classes, seeds, Sampling(guidance=1.0 + 1e-9))
    assert all(torch.equal(a, b) for a, b in zip(plain, nearly, strict=True))
    forgotten = Prior([model]).generate(classes, seeds, Sampling(guidance=0.0))
    none = Prior([model]).generate(torch.full((2,), model.no_class), seeds, Sampling())
    assert all(torch.equal(a, b) for a, b in zip(forgotten, none, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain, forgotten, strict=True))


def test_samples_follow_the_model() -> None:
    """The first code's frequencies over many seeds are the softmax of its logits."""
    model, count = make(), 4000
    classes = torch.full((count,), 1)
    first = Prior([model]).generate(classes, list(range(count)), Sampling())[0][:, 0, 0]
    wanted = model([], sample_codes(1), torch.tensor([1]))[0][0, 0].softmax(0)
    seen = torch.bincount(first, minlength=5) / count
    assert (seen - wanted).abs().max() < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [(Sampling(top_k=1), {2}), (Sampling(top_k=2), {2, 0}), (Sampling(top_p=0.6), {2, 0}), (Sampling(), {0, 1, 2, 3})],
)
def test_truncation(sampling: Sampling, allowed: set[int]) -> None:
    logits = torch.log(torch.tensor([[0.3, 0.15, 0.5, 0.05]])).expand(1000, -1)
    assert set(draw(logits, torch.linspace(0, 1 - 1e-7, 1000), sampling).tolist()) == allowed


def test_temperature_sharpens() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.6]])).expand(1000, -1)
    cold = draw(logits, torch.linspace(0, 1 - 1e-7, 1000), Sampling(temperature=0.1))
    assert (cold == 1).float().mean() > 0.95
