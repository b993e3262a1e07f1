"""The transformer: who sees what, its options, and that drawing codes step by step is the same network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vqscale.models import transformer_steps
from vqscale.models.generate import Draws, Sampling, draw
from vqscale.models.network import GridShape
from vqscale.models.steady import steady
from vqscale.models.transformer import Transformer
from vqscale.models.transformer_block import Shape, attend, rotate, rotations
from vqscale.models.transformer_steps import Decoder, Walk

GRIDS = (GridShape(2, 5), GridShape(4, 7))
PLAIN: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "modern": PLAIN | {"heads": 4, "key_value_heads": 2, "norm": "rms", "feed": "swiglu", "positions": "rotary"},
    "one key": PLAIN | {"heads": 4, "key_value_heads": 1, "feed_width": 24},
}


def make(name: str = "plain", given: int = 0) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(GRIDS[given:], 3, GRIDS[:given], **SHAPES[name]).eval()
    for parameter in model.parameters():  # the initial scale is too small to tell positions apart
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def generate(
    model: Transformer, classes: Tensor, seeds: Sequence[int], sampling: Sampling, given: Sequence[Tensor] = ()
) -> list[Tensor]:
    known = [torch.full((len(classes), grid.side, grid.side), -1) for grid in model.grids]
    with torch.no_grad():
        return model.sample(given, classes, Draws(sampling, seeds, torch.device("cpu")), known)


def sample_codes(batch: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(grid.codes, (batch, grid.side, grid.side), generator=generator) for grid in GRIDS]


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_no_position_sees_itself_or_the_future(name: str) -> None:
    model, codes, classes = make(name), sample_codes(1), torch.tensor([1])
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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(name: str, given: int, masked: bool) -> None:
    """Also when each step looks at the whole cache and masks what is not filled, as CUDA graphs have to."""
    model, codes, classes = make(name, given), sample_codes(4), torch.tensor([0, 1, 2, 3])
    full = model(codes[:given], codes[given:], classes)
    decoder = Decoder(model, classes, model.context(codes[:given]))
    flat = torch.cat([grid.flatten(1) for grid in codes[given:]], dim=1)
    for position in range(model.length):
        level, cell = model.locate(position)
        at = torch.tensor([position])
        step = decoder.logits(level, at, model.length if masked else position + 1, masked=masked)
        torch.testing.assert_close(step, full[level][:, cell], atol=1e-5, rtol=1e-5)
        decoder.put(flat[:, position], at)
    assert all(torch.equal(a, b) for a, b in zip(decoder.codes(), codes[given:], strict=True))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_steps_in_bf16_are_the_forward_under_autocast(name: str) -> None:
    """And the cache is as large as is said, which a GPU's batches are bounded by."""
    model, codes, classes = make(name), sample_codes(4), torch.tensor([0, 1, 2, 3])
    exact = model([], codes, classes)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model([], codes, classes)
    decoder = Decoder(model, classes, dtype=torch.bfloat16)
    flat, off, allowed = torch.cat([grid.flatten(1) for grid in codes], dim=1), 0.0, 0.0
    for position in range(model.length):
        level, cell = model.locate(position)
        at = torch.tensor([position])
        step = decoder.logits(level, at, position + 1)
        assert step.dtype == torch.bfloat16
        off += (step - exact[level][:, cell]).square().sum().item()
        allowed += (narrow[level][:, cell] - exact[level][:, cell]).square().sum().item()
        decoder.put(flat[:, position], at)
    assert 0 < off < 2 * allowed, "rounding errors are of the same size"
    caches = [part for block in decoder._blocks for part in (block._keys, block._values)]
    assert sum(part.numel() * part.itemsize for part in caches) == 4 * model.shape.cache_bytes(20, torch.bfloat16)


@torch.no_grad()
def test_what_is_given_reaches_every_code() -> None:
    model, codes, classes = make(given=1), sample_codes(1), torch.tensor([1])
    before = model(codes[:1], codes[1:], classes)[0]
    codes[0][0, 1, 1] = (codes[0][0, 1, 1] + 1) % GRIDS[0].codes
    assert (model(codes[:1], codes[1:], classes)[0] != before).any(dim=2).all()


def test_a_fine_cell_is_told_the_coarse_code_over_it() -> None:
    assert make().parent_cells(1).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
def test_groups_of_queries_share_keys_and_values(heads: int, groups: int) -> None:
    """Against attention written out; a single query and several take different ways."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, heads, 5, 8), torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 8)
    wanted = torch.empty_like(query)
    for head in range(heads):
        group = head * groups // heads
        scores = query[:, head] @ key[:, group].transpose(1, 2) / 8**0.5
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        wanted[:, head] = scores.softmax(-1) @ value[:, group]
    torch.testing.assert_close(attend(query, key, value), wanted)
    torch.testing.assert_close(attend(query[:, :, 4:], key, value), wanted[:, :, 4:])


def test_rotations_tell_differences_of_places_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(row: float, column: float, other_row: float, other_column: float) -> float:
        places = torch.tensor([[row, column], [other_row, other_column]])
        turns = rotations(places[:, 0], places[:, 1], 16)
        return float((rotate(query, turns[:, :1]) * rotate(key, turns[:, 1:])).sum())

    assert score(1, 2, 4, 7) == pytest.approx(score(6, 3, 9, 8), abs=1e-4)
    assert score(1, 2, 4, 7) != pytest.approx(score(1, 2, 7, 4), abs=1e-2)


def test_cells_of_both_levels_lie_on_one_plane() -> None:
    turns = make("modern").turns
    assert turns is not None
    middle = turns[:, 4:].unflatten(1, (4, 4))[:, :2, :2].mean(dim=(1, 2))  # of the cells under the first coarse one
    torch.testing.assert_close(turns[:, 0] / turns[:, 0].norm(dim=0), middle / middle.norm(dim=0))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not share width"):
        Shape(1, 16, 4, key_value_heads=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        Shape(1, 12, 2, positions="rotary")


def test_default_weights_have_the_names_that_checkpoints_have() -> None:
    names = {name for name, _ in make().named_parameters() if "blocks.1" in name}
    block = "norm_attention.weight norm_feed.weight query_key_value.weight project.weight"
    feed = "feed.0.weight feed.0.bias feed.2.weight feed.2.bias"
    assert names == {f"blocks.1.{name}" for name in f"{block} {feed}".split()}


@torch.no_grad()
def test_rows_of_a_linear_layer_do_not_depend_on_batch_or_threads(any_threads: None) -> None:
    torch.manual_seed(0)
    for inputs, outputs in ((384, 1152), (1536, 384), (128, 512), (20, 7)):
        layer, x = torch.nn.Linear(inputs, outputs), torch.randn(64, inputs)
        same, seen = steady(layer), set()
        torch.testing.assert_close(same(x), layer(x), atol=1e-5, rtol=1e-5)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen |= {same(x[-rows:])[-1].numpy().tobytes() for rows in (1, 2, 7, 16, 33, 64)}
        assert len(seen) == 1


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@torch.no_grad()
def test_logits_of_a_sample_are_those_of_any_batch_to_the_bit(guidance: float, any_threads: None) -> None:
    """So the same seed gives the same codes for batch 1, 7 and 64, and for ranks with more or fewer threads."""
    torch.manual_seed(0)
    model = Transformer((GridShape(2, 64), GridShape(4, 64)), 3, layers=2, width=96, heads=4).eval()
    classes, seeds = torch.arange(64) % 3, list(range(64))
    sampling = Sampling(guidance=guidance)
    together = generate(model, classes, seeds, sampling)
    for threads, batch in ((1, 1), (2, 7), (2, 64)):
        torch.set_num_threads(threads)
        some = generate(model, classes[:batch], seeds[:batch], sampling)
        assert all(torch.equal(a, b[:batch]) for a, b in zip(some, together, strict=True))


@torch.no_grad()
def test_logits_do_not_depend_on_the_batch_to_the_bit(any_threads: None) -> None:
    torch.manual_seed(0)
    model = Transformer((GridShape(4, 64),), 3, layers=2, width=384, heads=6).eval()
    codes, classes = torch.randint(64, (64, 16)), torch.arange(64) % 3
    seen: list[set[bytes]] = [set() for _ in range(16)]
    for threads, rows in ((1, 1), (2, 7), (1, 64), (2, 64)):
        torch.set_num_threads(threads)
        decoder = Decoder(model, classes[:rows])
        for position, logits in enumerate(seen):
            at = torch.tensor([position])
            logits.add(decoder.logits(0, at, position + 1)[0].numpy().tobytes())
            decoder.put(codes[:rows, position], at)
    assert [len(logits) for logits in seen] == [1] * 16


@pytest.mark.parametrize("stretch", [3, 4, 100])
def test_stretches_as_a_gpu_takes_them_draw_the_same(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorded step called as it is; what a CUDA graph makes of it needs a GPU."""
    monkeypatch.setattr(transformer_steps, "STRETCH", stretch)
    model, classes, sampling = make("modern"), torch.tensor([0, 1, 3]), Sampling(guidance=1.5, top_p=0.9)
    plain = generate(model, classes, [1, 2, 3], sampling)
    monkeypatch.setattr(
        Walk, "level", lambda walk, level, start, stop: walk.by_stretches(level, start, stop, lambda work: work)
    )
    again = generate(model, classes, [1, 2, 3], sampling)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


def test_same_seed_same_sample_in_any_batch() -> None:
    model, sampling = make(), Sampling(temperature=0.9, top_k=4, top_p=0.95, guidance=1.5)
    classes, seeds = torch.tensor([0, 1, 2, 0, 1, 2, 0]), list(range(7))
    together = generate(model, classes, seeds, sampling)
    for i in (0, 3, 6):
        alone = generate(model, classes[i : i + 1], seeds[i : i + 1], sampling)
        assert all(torch.equal(a[0], t[i]) for a, t in zip(alone, together, strict=True))


def test_what_is_given_is_kept_and_the_rest_follows_the_network() -> None:
    """Greedy codes of a network that is given the top level are the likeliest of its full forward."""
    model, codes, classes = make(given=1), sample_codes(3), torch.tensor([0, 1, 3])
    (drawn,) = generate(model, classes, [1, 2, 3], Sampling(top_k=1), codes[:1])
    with torch.no_grad():
        likeliest = model(codes[:1], [drawn], classes)[0].argmax(2)
    assert torch.equal(drawn.flatten(1), likeliest)


def test_guidance_one_is_none_and_zero_forgets_the_class() -> None:
    model, classes, seeds = make(), torch.tensor([0, 2]), [1, 2]
    plain = generate(model, classes, seeds, Sampling())
    nearly = generate(model, classes, seeds, Sampling(guidance=1.0 + 1e-9))
    assert all(torch.equal(a, b) for a, b in zip(plain, nearly, strict=True))
    forgotten = generate(model, classes, seeds, Sampling(guidance=0.0))
    none = generate(model, torch.full((2,), model.no_class), seeds, Sampling())
    assert all(torch.equal(a, b) for a, b in zip(forgotten, none, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain, forgotten, strict=True))


def test_schedules_of_guidance() -> None:
    assert Sampling(guidance=3.0).scales(3).tolist() == [3, 3, 3]
    assert Sampling(guidance=3.0, guidance_schedule="linear").scales(5).tolist() == [1, 1.5, 2, 2.5, 3]
    cosine = Sampling(guidance=3.0, guidance_schedule="cosine").scales(5)
    torch.testing.assert_close(cosine, torch.tensor([1, 2 - 0.5**0.5, 2, 2 + 0.5**0.5, 3]))


def test_a_schedule_begins_without_guidance_and_ends_with_all_of_it() -> None:
    """Greedy codes: the first is that of the class alone, the last that of full guidance after the same codes."""
    model, classes = make(), torch.tensor([0, 2])
    linear = generate(model, classes, [1, 2], Sampling(top_k=1, guidance=9.0, guidance_schedule="linear"))
    plain = generate(model, classes, [1, 2], Sampling(top_k=1))
    assert torch.equal(linear[0][:, 0, 0], plain[0][:, 0, 0])
    with torch.no_grad():
        given, none = (model([], linear, rows)[1][:, -1] for rows in (classes, torch.full((2,), model.no_class)))
    assert torch.equal(linear[1][:, 3, 3], (none + 9 * (given - none)).argmax(1))
    constant = generate(model, classes, [1, 2], Sampling(top_k=1, guidance=9.0))
    assert any(not torch.equal(a, b) for a, b in zip(linear, constant, strict=True))


def test_samples_follow_the_model() -> None:
    """The first code's frequencies over many seeds are the softmax of its logits."""
    model, count = make(), 4000
    classes = torch.full((count,), 1)
    first = generate(model, classes, list(range(count)), Sampling())[0][:, 0, 0]
    wanted = model([], sample_codes(1), torch.tensor([1]))[0][0, 0].softmax(0)
    seen = torch.bincount(first, minlength=5) / count
    assert (seen - wanted).abs().max() < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(top_k=1), {2}),
        (Sampling(top_k=2), {2, 0}),
        (Sampling(top_p=0.6), {2, 0}),
        (Sampling(top_k=1, top_p=0.6), {2}),
        (Sampling(top_k=9), {0, 1, 2, 3}),
        (Sampling(), {0, 1, 2, 3}),
    ],
)
def test_truncation(sampling: Sampling, allowed: set[int]) -> None:
    logits = torch.log(torch.tensor([[0.3, 0.15, 0.5, 0.05]])).expand(1000, -1)
    assert set(draw(logits, torch.linspace(0, 1 - 1e-7, 1000), sampling).tolist()) == allowed


def test_a_code_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, Sampling()).tolist() == [1, 1, 3, 3, 3]
    assert draw(logits, torch.ones(5), Sampling()).tolist() == [3] * 5


def test_temperature_sharpens() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.6]])).expand(1000, -1)
    cold = draw(logits, torch.linspace(0, 1 - 1e-7, 1000), Sampling(temperature=0.1))
    assert (cold == 1).float().mean() > 0.95
