import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.models.quantizer import Codebook, Donors, Statistics, update_codebooks, usage_figures

K, D, B, SIDE = 16, 4, 12, 3


def alone(tensor: Tensor) -> Tensor:
    return tensor


def latents(seed: int = 0, batch: int = B) -> Tensor:
    return torch.randn(batch, D, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def everyone(seed: int = 0) -> Donors:
    return Donors(torch.arange(B), B, seed)


def buffers(book: Codebook) -> list[Tensor]:
    return [book.codes.clone(), book.counts.clone(), book.sums.clone()]


def make(**options: float) -> Codebook:
    torch.manual_seed(0)
    return Codebook(K, D, **options)  # type: ignore[arg-type]


def test_forward_changes_nothing() -> None:
    book = make(restart_below=0.5)
    before = buffers(book)
    for mode in (True, False):
        book.train(mode)
        book(latents(), everyone())
        book(latents())
    assert all(torch.equal(a, b) for a, b in zip(before, buffers(book), strict=True))


def test_statistics_equal_the_one_hot_formula() -> None:
    book, z = make(), latents()
    out = book(z, everyone())
    rows, one_hot = z.permute(0, 2, 3, 1).reshape(-1, D), F.one_hot(out.codes.flatten(), K).float()
    assert torch.equal(out.statistics.counts, one_hot.sum(0))
    torch.testing.assert_close(out.statistics.sums, one_hot.T @ rows)
    assert out.latents.shape == z.shape
    assert out.codes.shape == (B, SIDE, SIDE)


def test_update_is_the_ema_of_counts_and_sums() -> None:
    book = make(decay=0.9)
    counts, sums = book.counts.clone(), book.sums.clone()
    seen: Statistics = book(latents(), everyone()).statistics
    update_codebooks([book], [seen], alone)
    counts, sums = 0.9 * counts + 0.1 * seen.counts, 0.9 * sums + 0.1 * seen.sums
    torch.testing.assert_close(book.counts, counts)
    torch.testing.assert_close(book.codes, sums / counts[:, None])


def test_the_first_updates_follow_faster() -> None:
    """min(decay, (1 + n) / (10 + n)): a tenth at the first update, the full decay later."""
    for updates, decay in ((0, 0.1), (8, 0.5), (10_000, 0.9)):
        book = make(decay=0.9)
        before, seen = book.counts.clone(), book(latents(), everyone()).statistics
        update_codebooks([book], [seen], alone, updates)
        torch.testing.assert_close(book.counts, decay * before + (1 - decay) * seen.counts)


def test_gradient_passes_straight_through() -> None:
    z = latents().requires_grad_()
    weights = torch.randn(z.shape)
    (make()(z).latents * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


def test_commitment_pulls_latents_to_their_codes() -> None:
    book, z = make(), latents().requires_grad_()
    out = book(z)
    out.commitment.backward()
    torch.testing.assert_close(out.commitment, F.mse_loss(z.detach(), out.latents.detach()))
    torch.testing.assert_close(z.grad, 2 * (z - out.latents).detach() / z.numel())


def test_an_unused_code_stays_where_it_is_for_ever() -> None:
    book = make(decay=0.5, restart_below=0.0)
    book.codes[3] = book.sums[3] = 1000.0
    for step in range(300):
        update_codebooks([book], [book(latents(step), everyone(step)).statistics], alone)
    torch.testing.assert_close(book.codes[3], torch.full((D,), 1000.0))
    assert torch.isfinite(book.codes).all()


def test_a_restart_resets_code_count_and_sum_and_stays_put() -> None:
    book = make(decay=0.99, restart_below=0.1)
    book.codes[3] = 1000.0
    book.counts[3], book.sums[3] = 1e-3, 1.0
    seen = book(latents(), everyone()).statistics
    figures = update_codebooks([book], [seen], alone)[0]
    assert figures.restarted >= 1
    expected = B * SIDE * SIDE / K
    assert any(torch.equal(book.codes[3], donor) for donor in seen.donors)
    assert book.counts[3] == expected
    torch.testing.assert_close(book.sums[3], book.codes[3] * expected)
    placed = book.codes[3].clone()
    update_codebooks([book], [book(latents(1), everyone(1)).statistics], alone)
    assert (book.codes[3] - placed).norm() < 0.1 * placed.norm()


def test_restarts_are_relative_to_expected_use_and_capped() -> None:
    for batch in (B, 4 * B):  # an absolute threshold would see other dead codes in a larger batch
        book = make(decay=0.0001, restart_below=0.5, max_restarts=2)
        book.codes[:8] = 1000.0  # no latent is near
        out = book(latents(0, batch), Donors(torch.arange(batch), batch, 0))
        assert update_codebooks([book], [out.statistics], alone)[0].restarted == 2


def test_restarts_can_be_switched_off() -> None:
    book = make(decay=0.0001, restart_below=0.0)
    book.codes[:8] = book.sums[:8] = 1000.0
    assert update_codebooks([book], [book(latents(), everyone()).statistics], alone)[0].restarted == 0
    torch.testing.assert_close(book.codes[:8], torch.full((8, D), 1000.0))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_nothing_depends_on_the_number_of_ranks(ranks: int) -> None:
    """The batch is dealt to ranks in packets of two; the sum of their statistics must do what one rank does."""
    one, z = make(restart_below=0.9), latents()
    many = copy.deepcopy(one)
    shares = [torch.arange(B).view(-1, 2)[rank::ranks].flatten() for rank in range(ranks)]
    parts = [many(z[share], Donors(share, B, 7)).statistics for share in shares]
    total = Statistics(*(sum(getattr(p, name) for p in parts) for name in Statistics.__annotations__))
    a = update_codebooks([one], [one(z, everyone(7)).statistics], alone)[0]
    b = update_codebooks([many], [total], alone)[0]
    assert a.restarted == b.restarted > 0
    assert torch.equal(one.counts, many.counts)
    torch.testing.assert_close(one.codes, many.codes)


def test_all_levels_share_one_collective() -> None:
    books, calls = [make(), make()], []

    def count(tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return tensor

    update_codebooks(books, [book(latents(), everyone()).statistics for book in books], count)
    assert len(calls) == 1


def test_levels_draw_different_donors() -> None:
    z = latents().flatten(2).transpose(1, 2)
    assert not torch.equal(everyone().draw(z, 0, 8), everyone().draw(z, 1, 8))
    assert torch.equal(everyone().draw(z, 0, 8), everyone().draw(z, 0, 8))


def test_state_stays_fp32_after_half() -> None:
    book = make()
    codes = book.codes.clone()
    book.half().to(torch.bfloat16)
    assert all(buffer.dtype == torch.float32 for buffer in book.buffers())
    assert torch.equal(book.codes, codes)
    assert not list(book.parameters())


def test_usage_and_perplexity() -> None:
    figures = usage_figures({"top": torch.tensor([5, 5, 0, 0]), "bottom": torch.tensor([1, 1, 1, 1])})
    assert figures["usage_top"] == 0.5
    assert figures["perplexity_top"] == pytest.approx(2)
    assert figures["perplexity_bottom"] == pytest.approx(4)
