"""The recipes of published models: their numbers, and that nothing but the data is missing to start them."""

from pathlib import Path

import pytest
import torch

from launcher.plan import make_plan
from launcher.recipes import find_recipe
from vqscale.config.load import load_recipe
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.training.build import build_tokenizer

PAPERS = {"imagenet256": (64, 32), "ffhq1024": (128, 64, 32), "sonnet-cifar10": (8,)}
"""Name → sides of the grids, from the finest."""


def recipe(name: str) -> Recipe:
    return load_recipe(find_recipe(name))


@pytest.mark.parametrize("name", PAPERS)
def test_grids_and_codebooks(name: str) -> None:
    found = recipe(name)
    assert tuple(level.grid for level in found.levels) == PAPERS[name]
    assert {(level.codes, level.dim) for level in found.tokenizer.levels} == {(512, 64)}
    quantizer = found.tokenizer.quantizer
    assert (quantizer.decay, quantizer.commitment, quantizer.learning) == (0.99, 0.25, "ema")


# Razavi et al. 2019, appendix, the table of hyper parameters of encoder and decoder for ImageNet-256 and FFHQ-1024:
# input size, latent layers, beta, batch size, hidden and residual units, layers, codebook size and dimension, steps.
# The decay, 0.99, stands in section 2.1 below equation 3; the loss, a squared error, is equation 2.
VQVAE2 = {
    "imagenet256": (256, (64, 32), 0.25, 128, 128, 64, 2, 512, 64, 2_207_444),
    "ffhq1024": (1024, (128, 64, 32), 0.25, 128, 128, 64, 2, 512, 64, 304_741),
}


@pytest.mark.parametrize("name", VQVAE2)
def test_settings_of_the_vqvae2_paper(name: str) -> None:
    found = recipe(name)
    tokenizer, training = found.tokenizer, found.tokenizer.training
    books = {(level.codes, level.dim, level.project) for level in tokenizer.levels}
    assert len(books) == 1
    codes, dim, projected = books.pop()
    widths = tokenizer.hidden, tokenizer.residual_hidden, tokenizer.residual_blocks
    ours = (
        found.data.image_size,
        tuple(level.grid for level in found.levels),
        tokenizer.quantizer.commitment,
        training.global_batch,
        *widths,
        codes,
        dim,
    )
    assert (*ours, training.steps) == VQVAE2[name]
    assert projected is None
    assert all(level.hidden is level.residual_blocks is level.residual_hidden is None for level in tokenizer.levels)
    assert (tokenizer.quantizer.decay, tokenizer.quantizer.learning) == (0.99, "ema")
    assert tokenizer.quantizer.distance == "euclidean"
    losses = tokenizer.losses
    assert (losses.reconstruction, losses.reconstruction_weight) == ("mse", 1.0)
    assert losses.perceptual is losses.adversarial is None
    assert (training.optimizer, training.weight_decay, training.schedule) == ("adamw", 0.0, "constant")  # Adam, then


def test_settings_of_sonnets_example() -> None:
    tokenizer = recipe("sonnet-cifar10").tokenizer
    training = tokenizer.training
    assert (tokenizer.hidden, tokenizer.residual_blocks, tokenizer.residual_hidden) == (128, 2, 32)
    assert (training.global_batch, training.steps, training.learning_rate) == (32, 10_000, 3e-4)
    assert tokenizer.quantizer.relief_below == 0  # its loss, exactly
    assert (training.schedule, training.clip, training.weight_decay, training.betas) == ("constant", 0, 0, (0.9, 0.999))
    # Its loss is divided by the variance of images in [-0.5, 0.5]; in [-1, 1] the squared error is four times that.
    assert tokenizer.losses.reconstruction_weight == pytest.approx(1 / (4 * 0.06327), rel=1e-3)


def test_layers_of_sonnets_example() -> None:
    torch.manual_seed(0)
    model = build_tokenizer(recipe("sonnet-cifar10").tokenizer)

    def shapes(part: torch.nn.Module) -> list[tuple[int, ...]]:
        return [tuple(value.shape) for name, value in part.named_parameters() if name.endswith("weight")]

    residual = [(32, 128, 3, 3), (128, 32, 1, 1)] * 2
    assert shapes(model.encoders[0]) == [(64, 3, 4, 4), (128, 64, 4, 4), (128, 128, 3, 3), *residual]
    assert shapes(model.before_quantizing[0]) == [(64, 128, 1, 1)]
    assert shapes(model.decoder) == [(128, 64, 3, 3), *residual, (128, 64, 4, 4)]
    assert shapes(model.to_pixels) == [(64, 3, 4, 4)]


@pytest.mark.parametrize("name", PAPERS)
def test_nothing_but_data_is_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/\w+/train: no such folder") as caught:
        make_plan(name, run=tmp_path / "run")
    assert "\n" not in str(caught.value)
    drawn = "data.clocks={train: 240000, validation: 100, shards: 240}"
    plan = make_plan(name, overrides=["data.train=''", "data.validation=''", drawn], run=tmp_path / "run")
    assert f"run        {name}" in plan.text()


@pytest.mark.parametrize("name", ["imagenet256", "ffhq1024"])
@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16])
def test_usual_numbers_of_gpus_divide(name: str, processes: int) -> None:
    assert load_recipe(find_recipe(name), [f"resources.processes={processes}"]).resources.processes == processes


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_sonnets_example_runs_on_1_2_and_4_processes(processes: int) -> None:
    found = load_recipe(find_recipe("sonnet-cifar10"), [f"resources.processes={processes}"])
    assert found.resources.processes == processes
