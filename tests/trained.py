"""Runs with a tokenizer and a prior of random weights, for what comes behind the trainings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tests.recipes import write_recipe
from tests.training_helpers import clock_run, code_shards, save_network
from vqscale.config.layout import RunLayout
from vqscale.data import clocks
from vqscale.loading import load_tokenizer
from vqscale.models.pixels import from_uint8
from vqscale.models.quantizer import Donors
from vqscale.models.vqvae import VQVAE
from vqscale.training.build import build_prior, build_tokenizer, grid_shapes


def save_tokenizer(run: Path, seed: int, step: int = 8) -> None:
    """A tokenizer with random weights, whose codes lie among the latents."""
    torch.manual_seed(seed)
    recipe = RunLayout(run).read_recipe()
    network = build_tokenizer(recipe.tokenizer)
    images, _ = clocks.draw(0, 64, recipe.data.image_size, seed)
    pixels, donors = from_uint8(images, torch.device("cpu")), Donors(torch.arange(64), 64, seed)
    assert isinstance(network, VQVAE)
    network.initialise_codebooks(pixels, donors, lambda tensor: tensor)
    save_network(network, RunLayout(run).root / "checkpoints" / "tokenizer", step)


def save_prior(run: Path, seed: int = 0, step: int = 8) -> None:
    """A prior with random weights, large enough for the classes to matter."""
    torch.manual_seed(seed)
    recipe = RunLayout(run).read_recipe()
    network = build_prior(recipe.prior, grid_shapes(recipe.levels), 12)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(8)
    save_network(network, run / "checkpoints" / "prior", step)


def trained_run(run: Path) -> Path:
    """A run over a few clocks with a tokenizer and a prior; nothing is drawn or measured yet."""
    clock_run(run, data__clocks={"train": 64, "validation": 16, "shards": 4})
    save_tokenizer(run, 0)
    save_prior(run)
    code_shards(run / "codes" / "train", fingerprint=load_tokenizer(run).fingerprint)
    return run


def copy_of(run: Path, folder: Path, **overrides: Any) -> Path:
    """A run with the same data and networks and other settings, as for `tiny_tree`."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("images"))
    write_recipe(folder / "recipe.yaml", data__clocks={"train": 64, "validation": 16, "shards": 4}, **overrides)
    return folder
