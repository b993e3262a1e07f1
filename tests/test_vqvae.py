import copy

import pytest
import torch
from torch import Tensor

from vqscale.models.quantizer import Codebook, Donors
from vqscale.models.vqvae import VQVAE, Widths


def make(factors: tuple[int, ...], codes: int = 8) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE([Codebook(codes, 4 + level) for level in range(len(factors))], factors, Widths(8, 1, 4))


def images(batch: int = 6, side: int = 16) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("factors", [(4,), (2, 2), (4, 2), (2, 2, 2), (2, 2, 2, 2), (8, 2)])
def test_shapes_of_any_hierarchy(factors: tuple[int, ...]) -> None:
    model, x = make(factors), images()
    output = model(x)
    assert output.images.shape == x.shape
    side = 16
    for level, factor in zip(output.levels, factors, strict=True):
        side //= factor
        assert level.codes.shape == (6, side, side)
        assert level.codes.max() < 8


@pytest.mark.parametrize("factors", [(4,), (4, 2), (2, 2, 2)])
def test_decoding_the_codes_gives_the_reconstruction(factors: tuple[int, ...]) -> None:
    model, x = make(factors).eval(), images()
    torch.testing.assert_close(model.decode(model.encode(x)), model(x).images)


def test_every_parameter_learns() -> None:
    model = make((2, 2, 2))
    output = model(images())
    (output.images.square().mean() + sum(level.commitment for level in output.levels)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_first_codes_are_latents_and_agree_over_ranks() -> None:
    """Two ranks hold half of the batch each; a sum over both stands in for the all-reduce."""
    x, whole = images(), make((4, 2), codes=16)
    halves = copy.deepcopy(whole)
    whole.initialise_codebooks(x, Donors(torch.arange(6), 6, 3), lambda t: t)
    for level in (1, 0):  # each level's draw needs those above it in place
        latents = _latents(halves, x, level)
        shares = [Donors(torch.arange(6)[part], 6, 3) for part in (slice(0, 3), slice(3, 6))]
        drawn = sum(
            share.draw(part.flatten(2).transpose(1, 2), level, 16)
            for share, part in zip(shares, latents.chunk(2), strict=True)
        )
        torch.testing.assert_close(whole.codebooks[level].codes, drawn, atol=0.05, rtol=0.05)
        halves.codebooks[level].initialise(whole.codebooks[level].codes, 1.0)
    assert len(torch.unique(whole.codebooks[1].codes, dim=0)) == 16


def _latents(model: VQVAE, x: Tensor, level: int) -> Tensor:
    seen = {}
    hook = model.before_quantizing[level].register_forward_hook(lambda m, i, out: seen.update(z=out.detach()))
    model.quantize(x)
    hook.remove()
    return seen["z"]
