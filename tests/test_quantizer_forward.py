"""The codebook's forward against the plain formula, its gradients, and what may happen around it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.models.nearest import nearest_codes
from vqscale.models.quantizer import Codebook, Donors, Quantized

K, D, B, SIDE = 24, 6, 4, 5


def latents(dtype: torch.dtype = torch.float32) -> Tensor:
    z = torch.randn(B, D, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return z.to(memory_format=torch.channels_last).to(dtype).requires_grad_()


def make() -> Codebook:
    torch.manual_seed(0)
    return Codebook(K, D)


def plain(book: Codebook, z: Tensor) -> Quantized:
    """As van den Oord et al. 2017 write it, differentiated by autograd."""
    rows = z.permute(0, 2, 3, 1).reshape(-1, D).float()
    codes = nearest_codes(rows, book.codes)
    vectors = F.embedding(codes, book.codes)
    straight = (rows + (vectors - rows).detach()).view(B, SIDE, SIDE, D).permute(0, 3, 1, 2).to(z.dtype)
    return Quantized(straight, codes.view(B, SIDE, SIDE), F.mse_loss(rows, vectors), None)


def loss(found: Quantized, straight: float, commitment: float) -> Tensor:
    weights = torch.linspace(-1, 1, found.latents.numel()).view(found.latents.shape)
    return straight * (found.latents.float() * weights).sum() + commitment * found.commitment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("straight", "commitment"), [(1.0, 0.25), (1.0, 0.0), (0.0, 3.0)])
def test_gradients_equal_those_of_the_plain_formula(dtype: torch.dtype, straight: float, commitment: float) -> None:
    book, z, same = make(), latents(dtype), latents(dtype)
    found, expected = book(z), plain(book, same)
    torch.testing.assert_close(found.latents, expected.latents)
    torch.testing.assert_close(found.commitment, expected.commitment)
    loss(found, straight, commitment).backward()
    loss(expected, straight, commitment).backward()
    torch.testing.assert_close(z.grad, same.grad)


def test_either_output_may_be_left_out_of_the_loss() -> None:
    for straight in (True, False):
        z, same, book = latents(), latents(), make()
        for found, leaf in ((book(z), z), (plain(book, same), same)):
            (found.latents.square().sum() if straight else 7 * found.commitment).backward()
            assert leaf.grad is not None
        torch.testing.assert_close(z.grad, same.grad)


def test_gradients_can_be_differentiated() -> None:
    book, seconds = make(), []
    for forward in (book, lambda z: plain(book, z)):
        z = latents()
        first = torch.autograd.grad(forward(z).commitment * 10, z, create_graph=True)[0]
        seconds.append(torch.autograd.grad(first.square().sum(), z)[0])
    torch.testing.assert_close(*seconds)


def test_a_later_update_of_the_codes_does_not_reach_the_backward() -> None:
    book, z, same = make(), latents(), latents()
    loss(book(z), 1.0, 1.0).backward()
    found = book(same)
    book.codes.mul_(100)
    loss(found, 1.0, 1.0).backward()
    assert torch.equal(z.grad, same.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_the_vectors_that_a_decoder_looks_up(dtype: torch.dtype) -> None:
    book, z = make(), latents(dtype)
    found = book(z)
    assert torch.equal(found.latents, book.lookup(found.codes).to(dtype))
    assert found.latents.dtype == dtype
    assert found.latents.is_contiguous(memory_format=torch.channels_last)


def test_training_and_extraction_pick_the_same_codes() -> None:
    book, z = make(), latents()
    training = book(z, Donors(torch.arange(B), B, 0))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        extraction = book(z.detach())
    assert torch.equal(training.codes, extraction.codes)
    assert extraction.statistics is None


def test_statistics_do_not_depend_on_the_number_of_threads() -> None:
    book, z, before = make(), torch.randn(30, D, 20, 20), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(book(z, Donors(torch.arange(30), 30, 0)).statistics)
    finally:
        torch.set_num_threads(before)
    for name in ("counts", "sums", "donors", "error"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


def test_the_forward_compiles_in_one_piece() -> None:
    book, z = make(), latents()
    compiled = torch.compile(lambda z: book(z).latents, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), book(z).latents)
