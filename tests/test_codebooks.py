import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vqscale.models.codebooks import GradientCodebook, UnitCodebook, UnitGradientCodebook, lloyd
from vqscale.models.quantizer import Codebook, Donors, LevelFigures, Statistics, update_codebooks
from vqscale.training.guards import CodebookMismatchError, compare_codebooks
from vqscale.training.windows import CodeWindow, PixelWindow

torch.set_num_threads(1)  # what is computed is small: more threads would wait for each other

K, D, B, SIDE = 16, 4, 12, 3
CPU = torch.device("cpu")
KINDS = [Codebook, GradientCodebook, UnitCodebook, UnitGradientCodebook]
GRADIENT, UNIT = [GradientCodebook, UnitGradientCodebook], [UnitCodebook, UnitGradientCodebook]
BETAS = (0.8, 0.95)


def alone(tensor: Tensor) -> Tensor:
    return tensor


def make(kind: type[Codebook], **options: Any) -> Codebook:
    torch.manual_seed(0)
    return kind(K, D, **({"betas": BETAS} if kind in GRADIENT else {}) | options)


def latents(seed: int = 0, batch: int = B, unit: bool = False) -> Tensor:
    z = torch.randn(batch, D, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return F.normalize(z, dim=1) if unit else z


def of(book: Codebook, seed: int = 0, batch: int = B) -> Tensor:
    return latents(seed, batch, isinstance(book, UnitCodebook))


def everyone(seed: int = 0, batch: int = B) -> Donors:
    return Donors(torch.arange(batch), batch, seed)


def train(book: Codebook, steps: int, rate: float = 1e-2, first: int = 0) -> list[LevelFigures]:
    figures = []
    for step in range(first, first + steps):
        seen = book(of(book, step), everyone(step)).statistics
        figures += update_codebooks([book], [seen], alone, rate=rate)
    return figures


def state(book: Codebook) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in book.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- gradients


@pytest.mark.parametrize("kind", GRADIENT)
def test_gradient_codebook_is_a_parameter_under_adam(kind: type[Codebook]) -> None:
    """Equation 3's codebook term through autograd and torch's Adam; some codes are never used."""
    book = make(kind)
    book.codes[5:9] = book.codes[0]  # never nearest: ties go to the lowest
    weight = book.codes.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=1e-2, betas=BETAS)
    for step in range(12):
        z = of(book, step)
        codes = book(z).codes.flatten()
        rows = z.permute(0, 2, 3, 1).reshape(-1, D)
        placed = F.normalize(weight) if kind in UNIT else weight
        optimizer.zero_grad()
        F.mse_loss(placed[codes], rows).backward()
        optimizer.step()
        if kind in UNIT:  # ours stays on the sphere after each step
            weight.data.copy_(F.normalize(weight.data))
        update_codebooks([book], [book(z, everyone(step)).statistics], alone, rate=1e-2)
        torch.testing.assert_close(book.codes, weight.detach(), rtol=1e-4, atol=1e-6)


def test_without_a_rate_codes_that_learn_by_gradients_stay() -> None:
    book = make(GradientCodebook)
    before = book.codes.clone()
    train(book, 3, rate=0.0)
    assert torch.equal(book.codes, before)


def test_codebook_loss_falls() -> None:
    book, z = make(GradientCodebook), latents()
    before = float(book(z).commitment)
    for step in range(50):
        update_codebooks([book], [book(z, everyone(step)).statistics], alone, rate=3e-2)
    assert float(book(z).commitment) < 0.7 * before


@pytest.mark.parametrize("kind", KINDS)
def test_beta_weighs_the_commitment_and_never_the_codes(kind: type[Codebook]) -> None:
    moved = []
    for beta in (0.25, 4.0):
        book = make(kind)
        z = of(book).requires_grad_()
        out = book(z, everyone())
        (beta * out.commitment).backward()
        torch.testing.assert_close(z.grad, beta * 2 * (z - out.latents).detach() / z.numel())
        update_codebooks([book], [out.statistics], alone, rate=1e-2)
        moved.append(book.codes)
    assert torch.equal(*moved)


@pytest.mark.parametrize("kind", GRADIENT)
def test_a_restarted_code_has_fresh_moments_and_stays_put(kind: type[Codebook]) -> None:
    book = make(kind, restart_below=0.2, decay=0.5, max_restarts=3)
    train(book, 4)
    book.codes[2], book.counts[2] = book.codes[0], 0.0  # never nearest
    before, seen = state(book), book(of(book, 50), everyone(50)).statistics
    update_codebooks([book], [seen], alone, rate=1e-2)
    restarted = (book.ages == 0).nonzero().flatten().tolist()
    assert 2 in restarted
    for code in restarted:
        assert any(torch.equal(book.codes[code], donor) for donor in seen.donors)
        assert not book.first[code].any()
        assert not book.second[code].any()
        assert book.counts[code] == B * SIDE * SIDE / K
    others = [code for code in range(K) if code not in restarted]
    assert torch.equal(book.ages[others], before["ages"][others] + 1)
    placed = book.codes[2].clone()
    update_codebooks([book], [book(of(book, 51), everyone(51)).statistics], alone, rate=1e-2)
    assert (book.codes[2] - placed).abs().max() < 1.5e-2  # a first step of Adam is as long as the rate


@pytest.mark.parametrize("kind", GRADIENT)
def test_both_gradients_of_equation_3_are_those_of_the_whole_loss(kind: type[Codebook]) -> None:
    """Reconstruction + |sg[z] - e|² + beta |z - sg[e]|² in one graph: what reaches the latents, and what the codes."""
    book, beta, decode = make(kind), 0.25, torch.randn(D, 3, generator=torch.Generator().manual_seed(1))
    z, same = of(book).requires_grad_(), of(book).requires_grad_()
    e = book.codes.clone().requires_grad_()
    rows = same.permute(0, 2, 3, 1).reshape(-1, D)
    found = book(z, everyone())
    placed = (F.normalize(e) if kind in UNIT else e)[found.codes.flatten()]
    through = rows + (placed - rows).detach()
    whole = (through @ decode).square().mean() + F.mse_loss(placed, rows.detach())
    (whole + beta * F.mse_loss(rows, placed.detach())).backward()
    ours = found.latents.permute(0, 2, 3, 1).reshape(-1, D)
    ((ours @ decode).square().mean() + beta * found.commitment).backward()
    torch.testing.assert_close(z.grad, same.grad)
    torch.testing.assert_close(book.gradient(found.statistics.counts, found.statistics.sums), e.grad)


def test_ranks_are_compared_by_all_that_a_codebook_keeps() -> None:
    """Moments that differ make codes differ later, when nobody can say why."""

    class Two:
        """This rank and another one, which comes first."""

        def __init__(self, other: dict[str, str]) -> None:
            self.other = other

        def gather(self, mine: dict[str, str]) -> list[dict[str, str]]:
            return [self.other or mine, mine]

    sent: list[dict[str, str]] = []
    book = make(GradientCodebook)
    ranks = Two({})
    ranks.gather = lambda mine: sent.append(mine) or [mine]  # type: ignore[method-assign, func-returns-value]
    compare_codebooks({"top": book}, ranks, 1)  # type: ignore[arg-type]
    for name in dict(book.named_buffers()):
        changed = copy.deepcopy(book)
        changed.get_buffer(name).view(-1)[0] += 1e-6
        with pytest.raises(CodebookMismatchError, match="step 7: the codebook of level 'top' on rank 1"):
            compare_codebooks({"top": changed}, Two(sent[0]), 7)  # type: ignore[arg-type]


# --- unit length


@pytest.mark.parametrize("kind", UNIT)
def test_unit_codes_stay_on_the_sphere(kind: type[Codebook]) -> None:
    book = make(kind, restart_below=0.5, decay=0.7)
    ones = torch.ones(K)
    torch.testing.assert_close(book.codes.norm(dim=1), ones)
    book.initialise(3 * torch.randn(K, D), 1.0)
    torch.testing.assert_close(book.codes.norm(dim=1), ones)
    restarted = sum(int(figures.restarted) for figures in train(book, 10))
    assert restarted > 0
    torch.testing.assert_close(book.codes.norm(dim=1), ones)


def test_unit_codes_are_the_normalised_means() -> None:
    book = make(UnitCodebook, decay=0.9)
    counts, sums = book.counts.clone(), book.sums.clone()
    seen: Statistics = book(of(book), everyone()).statistics
    update_codebooks([book], [seen], alone)
    expected = F.normalize((0.9 * sums + 0.1 * seen.sums) / (0.9 * counts + 0.1 * seen.counts)[:, None])
    torch.testing.assert_close(book.codes, expected)


# --- what holds of all


@pytest.mark.parametrize("kind", KINDS)
def test_forward_changes_nothing(kind: type[Codebook]) -> None:
    book = make(kind, restart_below=0.5)
    before = state(book)
    book(of(book), everyone())
    book.eval()(of(book))
    assert equal(before, state(book))


@pytest.mark.parametrize("kind", KINDS)
def test_two_batches_of_a_step_are_one(kind: type[Codebook]) -> None:
    """Gradient accumulation: half of the batch each, in one update."""
    whole = make(kind, restart_below=0.9, decay=0.5)
    halves, z = copy.deepcopy(whole), of(whole)
    once = update_codebooks([whole], [whole(z, everyone()).statistics], alone, rate=1e-2)[0]
    parts = [halves(z[part], Donors(torch.arange(B)[part], B, 0)).statistics for part in (slice(0, 5), slice(5, B))]
    twice = update_codebooks([halves], [parts[0] + parts[1]], alone, rate=1e-2)[0]
    assert once.restarted == twice.restarted > 0
    assert torch.equal(once.counts, twice.counts)
    torch.testing.assert_close(state(halves), state(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_restored_goes_on_bit_by_bit(kind: type[Codebook]) -> None:
    options = {"restart_below": 0.8, "decay": 0.4}
    book, other = make(kind, **options), kind(K, D, **({"betas": BETAS} if kind in GRADIENT else {}) | options)
    train(book, 5)
    other.load_state_dict(book.state_dict())
    figures, again = train(book, 5, first=5), train(other, 5, first=5)
    assert [int(f.restarted) for f in figures] == [int(f.restarted) for f in again]
    assert sum(int(f.restarted) for f in figures) > 0
    assert equal(state(book), state(other))


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_fp32_buffers_whatever_the_network_is_cast_to(kind: type[Codebook]) -> None:
    book = make(kind)
    before = state(book)
    book.half().to(torch.bfloat16)
    assert not list(book.parameters())
    assert equal(before, state(book))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unused_code_neither_explodes_nor_falls_to_the_origin(kind: type[Codebook]) -> None:
    """At the first step, where others divide by a count of nothing, and after so many that decay^n is nothing."""
    book = make(kind)
    book.codes[3:] = book.codes[0]
    book.sums[3:] = book.sums[0]
    train(book, 1)
    assert book.codes.norm(dim=1).max() < 3
    placed = book.codes[7].clone()
    z = of(book)[:1]
    seen = Statistics(*(value.clone() for value in book(z, everyone(0, 1)).statistics))
    seen.counts[7], seen.sums[7] = 0, 0
    for _ in range(1_100):  # 0.9^n is below fp32's smallest number after 980, 0.99^n after 10,346
        book.update(seen.counts, seen.sums, seen.donors, 0.9, 1e-6)
    assert book.counts[7] < 1e-40
    assert all(value.isfinite().all() for value in book.buffers())
    torch.testing.assert_close(book.codes[7], placed, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_counts_and_sums_are_fp32_for_latents_in_half_precision(dtype: torch.dtype) -> None:
    """A hundred thousand vectors on one code: more than fp16 can count, far more than bf16."""
    book = make(Codebook)
    z = (book.codes[3].view(1, D, 1, 1).expand(1, D, 250, 400)).to(dtype)
    seen = book(z, everyone(0, 1)).statistics
    assert seen.counts[3] == 100_000
    # Equal addends, one after the other, are fp32's worst case: n · 2⁻²⁵.
    torch.testing.assert_close(seen.sums[3], z[0, :, 0, 0].float() * 100_000, rtol=3e-3, atol=0)


def test_half_precision_latents_move_codes_as_fp32_ones_do() -> None:
    """An EMA in bf16 would stay where it is: 1 % of a step is below its rounding."""
    plain, half = make(Codebook, decay=0.999), make(Codebook, decay=0.999)
    for step in range(200):
        z = (latents(step) + 5).bfloat16()
        for book, seen in ((plain, z.float()), (half, z)):
            update_codebooks([book], [book(seen, everyone(step)).statistics], alone)
    torch.testing.assert_close(half.codes, plain.codes, rtol=1e-4, atol=1e-4)
    assert half.codes.max() > 4.5


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_reads_nothing_back_from_the_device(kind: type[Codebook]) -> None:
    """Under fake tensors a value that the host asks for raises."""
    with FakeTensorMode():
        book = make(kind, restart_below=0.5)
        parts = (torch.ones(K), torch.randn(K, D), torch.randn(16, D), torch.ones(1))
        figures = update_codebooks([book], [Statistics(*parts)], alone, 3, 1e-2)[0]
    assert figures.counts.shape == (K,)


# --- k-means


def test_lloyd_is_plain_kmeans() -> None:
    book, z = make(Codebook), latents()
    centres, rows = book.codes.numpy().copy(), z.permute(0, 2, 3, 1).reshape(-1, D).numpy()
    for _ in range(4):
        nearest = ((rows[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        for code in set(nearest.tolist()):
            centres[code] = rows[nearest == code].mean(axis=0)
    lloyd(book, z, everyone(), 0, 4, alone)
    np.testing.assert_allclose(book.codes, centres, rtol=1e-4, atol=1e-5)
    assert (book.counts == len(rows) / K).all()


@pytest.mark.parametrize("kind", [Codebook, UnitCodebook])
def test_lloyd_does_not_depend_on_the_ranks(kind: type[Codebook]) -> None:
    """Two ranks in turn, iteration by iteration: each adds what the other has seen, as the all-reduce does."""
    one = make(kind)
    start, z = copy.deepcopy(one), of(one)
    lloyd(one, z, everyone(), 0, 3, alone)
    for _ in range(3):
        first, second = copy.deepcopy(start), copy.deepcopy(start)
        sent: list[Tensor] = []
        lloyd(second, z[7:], everyone(), 0, 1, lambda seen, sent=sent: sent.append(seen) or seen)  # type: ignore[func-returns-value]
        lloyd(first, z[:7], everyone(), 0, 1, lambda seen, sent=sent: seen + sent[0])
        start = first
    torch.testing.assert_close(start.codes, one.codes)


# --- windows


def level(counts: list[float], restarted: float = 0.0, distance: float = 1.0) -> LevelFigures:
    values = torch.tensor(counts)
    share = values / values.sum()
    perplexity = torch.exp(-torch.xlogy(share, share).sum())
    return LevelFigures(
        (values > 0).float().mean(), perplexity, torch.tensor(restarted), torch.tensor(distance), values
    )


def test_window_counts_the_last_steps_together() -> None:
    window = CodeWindow({"top": 4}, 2, CPU)
    assert window.figures() == {}
    window.add(0, [level([90_000, 0, 0, 0], restarted=9, distance=9.0)])  # left by step 2
    assert window.figures()["top"]["used"] == 0.25
    assert not window.full
    window.add(1, [level([0, 90_000, 0, 0], restarted=1, distance=2.0)])
    window.add(2, [level([0, 0, 30_000, 0], restarted=2, distance=6.0)])
    share = np.array([0.75, 0.25])
    assert window.full
    assert window.figures()["top"] == pytest.approx(
        {
            "used": 0.5,
            "perplexity": np.exp(-(share * np.log(share)).sum()),
            "dead": 2,
            "batch_perplexity": 1,
            "restarted": 1.5,
            "distance": 3.0,  # of a latent, not of a step: (90,000 · 2 + 30,000 · 6) / 120,000
        }
    )


def test_window_goes_on_after_a_resume() -> None:
    window, other = CodeWindow({"a": 4, "b": 4}, 3, CPU), CodeWindow({"a": 4, "b": 4}, 3, CPU)
    for step in range(5):
        window.add(step, [level([1, step, 0, 0]), level([0, 0, step, 9])])
    other.load({name: value.clone() for name, value in window.state().items()})
    for both in (window, other):
        both.add(5, [level([0, 0, 7, 0]), level([0, 0, 0, 7])])
    assert window.figures() == other.figures()
    for short in ({}, CodeWindow({"a": 4, "b": 4}, 2, CPU).state()):
        fresh = CodeWindow({"a": 4, "b": 4}, 3, CPU)
        fresh.load(short)
        assert fresh.figures() == {}


def test_a_collapsing_level_is_named_with_its_figures_and_the_remedies() -> None:
    window = CodeWindow({"bottom": 64, "top": 64}, 2, CPU)
    lost = [10_000.0] + [1.0] * 40 + [0.0] * 23  # restarts give many codes a use: usage alone would not show it
    window.add(0, [level([1.0] * 64), level(lost)])
    assert window.collapsed(window.figures(), 1.0) == {}  # half of a window
    window.add(1, [level([1.0] * 64), level(lost)])
    found = window.collapsed(window.figures(), 0.05)
    assert list(found) == ["top"]
    for word in ("'top'", "perplexity 1.0 a batch", "64 codes", "usage 64.1%", "'bottom' uses 100%", "commitment",
                 "continuous_steps", "restart_below"):  # fmt: skip
        assert word in found["top"]
    assert window.collapsed(window.figures(), 0.0) == {}


def test_clusters_that_wander_from_code_to_code_are_a_collapse() -> None:
    """Over the window all codes are used alike, and yet a batch has two."""
    window = CodeWindow({"top": 64}, 32, CPU)
    for step in range(32):
        window.add(step, [level([500.0 * (code // 2 == step) for code in range(64)])])
    assert window.figures()["top"]["perplexity"] == pytest.approx(64)
    assert "perplexity 2.0 a batch" in window.collapsed(window.figures(), 0.05)["top"]


def test_a_small_batch_is_no_collapse() -> None:
    window = CodeWindow({"top": 512}, 300, CPU)
    for step in range(300):
        window.add(step, [level([float((7 * step) % 512 <= code < (7 * step) % 512 + 4) for code in range(512)])])
    assert window.figures()["top"]["batch_perplexity"] < 0.05 * 512
    assert window.collapsed(window.figures(), 0.05) == {}


def test_the_latest_use_is_the_last_batchs_share_of_the_codes_that_it_could_use() -> None:
    window = CodeWindow({"top": 64}, 3, CPU)
    assert window.latest() == [1.0]  # nothing is known yet
    window.add(0, [level([1.0] * 64)])
    window.add(1, [level([25.0] * 16 + [0.0] * 48)])
    assert float(window.latest()[0]) == pytest.approx(0.25)
    window.add(2, [level([1.0] * 4 + [0.0] * 60)])  # four vectors on four codes
    assert float(window.latest()[0]) == pytest.approx(1.0)
    window.add(3, [level([25.0] * 16 + [0.0] * 48)])
    other = CodeWindow({"top": 64}, 3, CPU)
    other.load({name: value.clone() for name, value in window.state().items()})
    assert other.latest() == window.latest()


def test_pixel_window_is_the_error_over_the_variance() -> None:
    window = PixelWindow(2, CPU)
    batches = [torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    pairs = list(zip(batches[::2], batches[1::2], strict=True))
    window.see(*pairs[0])  # of a step that is not kept
    for step, seen in ((0, pairs[:1]), (1, pairs[1:3]), (2, pairs[3:])):  # step 2 replaces step 0
        window.forget()
        for rebuilt, images in seen:
            window.see(rebuilt, images)
        window.keep(step)
    rebuilt, images = (torch.cat([pair[side] for pair in pairs[1:]]) for side in (0, 1))
    expected = F.mse_loss(rebuilt, images) / images.var(correction=0)
    assert window.normalised_error(alone) == pytest.approx(float(expected), rel=1e-5)
    assert window.normalised_error(lambda t: 2 * t) == pytest.approx(float(expected), rel=1e-5)  # two equal ranks
    first, second = PixelWindow(2, CPU), PixelWindow(2, CPU)
    for rank, loaded in enumerate((first, second)):
        loaded.load(window.state(lambda t: 2 * t), first=rank == 0)
    both = first.state(alone)["window.pixels"] + second.state(alone)["window.pixels"]
    assert torch.equal(both, 2 * window.state(alone)["window.pixels"]), "the ranks' windows add up, as before"
