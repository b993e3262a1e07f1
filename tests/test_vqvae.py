import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.models.codebooks import UnitCodebook
from vqscale.models.convnets import Widths, doubling
from vqscale.models.quantizer import Codebook, Donors, update_codebooks
from vqscale.models.vqvae import VQVAE, LevelShape

torch.set_num_threads(1)  # what is computed is small: more threads would wait for each other


def make(factors: tuple[int, ...], codes: int = 8) -> VQVAE:
    torch.manual_seed(0)
    books = [Codebook(codes, 4 + level) for level in range(len(factors))]
    return VQVAE(books, [LevelShape(factor, Widths(8, 1, 4)) for factor in factors])


def varied() -> VQVAE:
    """Three levels that differ in all that can differ: widths, projection, distance, factor."""
    torch.manual_seed(0)
    books = [UnitCodebook(8, 3), Codebook(12, 4), UnitCodebook(16, 5)]
    shapes = [
        LevelShape(4, Widths(8, 1, 4), dim=6, unit=True),
        LevelShape(2, Widths(12, 2, 5)),
        LevelShape(2, Widths(10, 3, 6), unit=True),
    ]
    return VQVAE(books, shapes)


def images(batch: int = 6, side: int = 16) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("factors", [(4,), (2, 2), (4, 2), (2, 2, 2), (2, 2, 2, 2), (8, 2), (2,), (2, 8)])
def test_shapes_of_any_hierarchy(factors: tuple[int, ...]) -> None:
    model, x = make(factors), images()
    output = model(x)
    assert output.images.shape == x.shape
    side = 16
    for level, factor in zip(output.levels, factors, strict=True):
        side //= factor
        assert level.codes.shape == (6, side, side)
        assert level.codes.max() < 8


def test_a_doubling_is_a_transposed_convolution() -> None:
    """Its bias is added by itself; that changes neither values nor gradients, nor what a checkpoint holds."""
    torch.manual_seed(0)
    ours, plain = doubling(5, 3).double(), torch.nn.ConvTranspose2d(5, 3, 4, stride=2, padding=1).double()
    plain.load_state_dict(ours.state_dict())
    x, pull = torch.randn(2, 5, 4, 6).double(), torch.randn(2, 3, 8, 12).double()
    found = []
    for layer in (ours, plain):
        value, inside = layer(given := x.clone().requires_grad_()), list(layer.parameters())
        found.append([value, *torch.autograd.grad(value, [given, *inside], pull)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_images_need_not_be_square() -> None:
    model = make((4, 2))
    output = model(images(2, 32)[:, :, :24])
    assert output.images.shape == (2, 3, 24, 32)
    assert [level.codes.shape[1:] for level in output.levels] == [(6, 8), (3, 4)]


def test_two_levels_have_the_parameters_of_the_reference() -> None:
    """Those of rosinality/vq-vae-2-pytorch with its own settings; its codebooks are buffers too."""
    shapes = [LevelShape(factor, Widths(128, 2, 32)) for factor in (4, 2)]
    model = VQVAE([Codebook(512, 64) for _ in shapes], shapes)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_388_867


def test_levels_have_their_own_widths_and_dimensions() -> None:
    model = varied()
    assert [encoder[0].out_channels for encoder in model.encoders] == [4, 6, 5]
    assert [encoder[-1].__class__.__name__ for encoder in model.encoders] == ["ReLU"] * 3
    assert [len([m for m in encoder if hasattr(m, "layers")]) for encoder in model.encoders] == [1, 2, 3]
    assert [conv.out_channels for conv in model.before_quantizing] == [3, 4, 5]
    assert [getattr(lift, "out_channels", None) for lift in model.lifts] == [6, None, None]
    assert [level.codes.max() < size for level, size in zip(model(images()).levels, (8, 12, 16), strict=True)]


@pytest.mark.parametrize("model", [make((4,)), make((4, 2)), make((2, 2, 2)), varied()])
def test_decoding_the_codes_gives_the_reconstruction(model: VQVAE) -> None:
    x = images()
    torch.testing.assert_close(model.eval().decode(model.encode(x)), model(x).images)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("model", [make((2, 2, 2)), varied()])
def test_every_parameter_learns(model: VQVAE, quantized: bool) -> None:
    model.zero_grad()
    output = model(images(), quantized=quantized)
    (output.images.square().mean() + sum(level.commitment for level in output.levels)).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_unit_levels_search_the_largest_cosine() -> None:
    model, x = varied(), images()
    for level in (0, 2):
        z = F.normalize(_latents(model, x, level).float(), dim=1)
        cosine = torch.einsum("bdhw,kd->bkhw", z, F.normalize(model.codebooks[level].codes))
        found = model.encode(x)[level]
        best = cosine.amax(dim=1)
        torch.testing.assert_close(cosine.gather(1, found[:, None])[:, 0], best)


def test_nothing_in_the_network_talks_to_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective inside the forward hangs as soon as one rank goes through it alone, as in an evaluation."""

    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("asks for other ranks")

    for name in ("all_reduce", "all_gather", "broadcast", "barrier", "get_rank", "get_world_size", "is_initialized"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    model = varied()
    output = model(images(), Donors(torch.arange(6), 6, 0))
    (output.images.square().mean() + sum(level.commitment for level in output.levels)).backward()
    model.eval().decode(model.encode(images()))
    statistics, sums = [level.statistics for level in output.levels], []
    update_codebooks(list(model.codebooks), statistics, lambda tensor: sums.append(tensor) or tensor)  # type: ignore[arg-type, func-returns-value]
    assert len(sums) == 1  # through the one function that it is given


def test_features_are_what_the_last_layer_sees() -> None:
    model = make((4, 2))
    output = model(images())
    torch.testing.assert_close(model.to_pixels(output.features), output.images, rtol=0, atol=0)


def test_encoding_and_decoding_build_no_graph() -> None:
    model = varied()
    assert not model.decode(model.encode(images())).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_goes_through(dtype: torch.dtype) -> None:
    model = varied()
    with torch.autocast("cpu", dtype):
        output = model(images(), Donors(torch.arange(6), 6, 0))
    (output.images.float().square().mean() + sum(level.commitment for level in output.levels)).backward()
    for level in output.levels:
        assert level.statistics.counts.dtype == level.statistics.sums.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


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


@pytest.mark.parametrize("model", [make((4, 2), codes=12), varied()])
def test_kmeans_brings_codes_nearer_to_the_latents(model: VQVAE) -> None:
    x, donors = images(), Donors(torch.arange(6), 6, 3)
    distances = []
    for iterations in (0, 1, 10):
        model.initialise_codebooks(x, donors, lambda t: t, iterations)
        distances.append([float(level.commitment.detach()) for level in model(x).levels])
    top = [level[-1] for level in distances]  # a lower level's latents are not the same ones
    assert top[0] > top[1] >= top[2]
    assert distances[2][0] < distances[0][0]


def _latents(model: VQVAE, x: Tensor, level: int) -> Tensor:
    seen = {}
    hook = model.before_quantizing[level].register_forward_hook(lambda m, i, out: seen.update(z=out.detach()))
    model.quantize(x)
    hook.remove()
    return seen["z"]
