"""The benchmark `tokenizer`: its formulas count right, it compares what it says, and it runs; no time is asserted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import tokenizer
from benchmarks.harness import Bench, Options, WrongResultError
from benchmarks.one_process import one_process
from benchmarks.quantizer_peers import find
from benchmarks.tokenizer_check import check_cost, check_networks
from benchmarks.tokenizer_cost import Convolution, convolutions, search_flops
from benchmarks.tokenizer_peers import PlainVQVAE2, Shape, normalised
from vqscale.config.load import load_recipe
from vqscale.models.convnets import Widths
from vqscale.models.pixels import from_uint8
from vqscale.models.quantizer import Codebook
from vqscale.models.vqvae import VQVAE, LevelShape
from vqscale.training.build import build_tokenizer

TINY = Widths(8, 1, 4)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A quick one."""
    return Bench("tokenizer", tmp_path, Options(quick=True), tokenizer.GOALS, tokenizer.PACKAGES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("factors", [[4], [4, 2], [2, 4, 2]])
def test_formulas_count_what_torch_counts_for_any_number_of_levels(
    bench: Bench, factors: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shapes, dims = [LevelShape(factor, TINY) for factor in factors], [4, 6, 8][: len(factors)]
    network = VQVAE([Codebook(8, dim) for dim in dims], shapes).to(dtype)
    images = torch.randn(2, 3, 32, 32).to(dtype)

    def step() -> None:
        output = network(images)
        (output.images.float().square().mean() + sum(level.commitment for level in output.levels)).backward()

    layers = convolutions(shapes, dims, 32)
    check_cost(bench, layers, 2, dtype.itemsize, step)
    with pytest.raises(WrongResultError, match="flops"):
        check_cost(bench, layers[1:], 2, dtype.itemsize, step)


def test_the_recipe_s_cost_is_the_one_that_is_known() -> None:
    recipe = load_recipe(tokenizer.RECIPE, ["tokenizer.residual_hidden=32"])
    layers = tokenizer.layers_of(build_tokenizer(recipe.tokenizer), recipe.tokenizer, recipe.data.image_size)
    # With rosinality's residual width: 7.53 GFLOP of convolutions, 0.34 of search.
    assert round(sum(layer.flops for layer in layers) / 1e9, 2) == 7.53
    assert round(search_flops([512, 512], [64, 64], [level.grid for level in recipe.levels]) / 1e9, 2) == 0.34


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_alone_has_the_shapes_of_its_formula(transposed: bool) -> None:
    layer = Convolution(3, 5, 4, 8, stride=2, transposed=transposed)
    forward, backward = tokenizer.alone(layer, 2, torch.device("cpu"), torch.float32)
    assert forward().shape == (2, 5, layer.out_side, layer.out_side)
    image, kernel, bias = backward()
    assert image.shape == (2, 3, 8, 8)
    assert kernel.shape == ((3, 5, 4, 4) if transposed else (5, 3, 4, 4))
    assert bias is None


def test_both_read_images_alike() -> None:
    images = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    torch.testing.assert_close(normalised(images), from_uint8(images, torch.device("cpu")), rtol=0, atol=1e-6)
    assert normalised(images).is_contiguous()


def test_a_plain_network_that_computes_something_else_stops_the_benchmark(bench: Bench) -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    ours = VQVAE([Codebook(16, 8), Codebook(16, 8)], [LevelShape(4, TINY), LevelShape(2, TINY)])
    plain = PlainVQVAE2(package, Shape(8, 1, 4, 8, 16), decay=0.99, commitment=0.25)
    images = torch.randn(2, 3, 32, 32)
    check_networks(bench, ours, plain, images, 0.25)
    with pytest.raises(WrongResultError, match="loss"):
        check_networks(bench, ours, plain, images, 0.5)
    plain.encode_bottom[1] = torch.nn.Identity()  # a ReLU
    with pytest.raises(WrongResultError, match=r"tokenizer: (loss|gradients):"):
        check_networks(bench, ours, plain, images, 0.25)


def test_it_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would hold for all tests that come after.
    asked: list[str] = []
    monkeypatch.setattr(tokenizer, "keep_heap", lambda: asked.append("heap"))
    monkeypatch.setattr(tokenizer, "THREADS", 1)
    before = torch.get_num_threads()
    tokenizer.run(bench)
    assert torch.get_num_threads() == before
    found = bench.finish()
    assert {"fraction_of_bf16_conv_ceiling", "fraction_of_bf16_conv_peak"} <= set(found.ratios)
    assert {"ours", "ours_gflops"} <= set(found.figures)
    assert {"convolutions", "peak"} == set(found.floors)
    assert {"flops", "bytes"} <= set(found.correctness)
    assert asked == ([] if torch.cuda.is_available() else ["heap"])
    if isinstance(find("vector_quantize_pytorch", "vector-quantize-pytorch"), str):
        assert "plain" in found.skipped
    else:
        assert ("vs_plain_bf16_peer" in found.ratios) == (found.config["precision"] == "bf16")
        assert "vs_plain_peer" in found.ratios
        assert {"parameters", "codes_bottom", "codes_top", "images", "loss", "gradients"} <= set(found.correctness)


def test_one_process_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with one_process() as ranks:
        assert (ranks.rank, ranks.world) == (0, 1)

    assert os.environ["RANK"] == "7"
    assert "WORLD_SIZE" not in os.environ
    assert not torch.distributed.is_initialized()
