"""Trained models outside of training: load a tokenizer or a prior, of a run or exported, and use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.config.exported import PRIOR, TOKENIZER
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe, Tokenizer
from vqscale.data.manifest import read_manifest
from vqscale.errors import UserError
from vqscale.exported import fill, is_run, read_exported
from vqscale.models.pixels import from_uint8, to_grey_levels, to_uint8
from vqscale.models.prior import Prior
from vqscale.models.vqvae import VQVAE
from vqscale.training.averaging import apply_average
from vqscale.training.build import build_prior, build_tokenizer, grid_shapes, shapes_of
from vqscale.training.checkpoints.reader import load_network, require
from vqscale.training.pieces import EXTRA


@dataclass(frozen=True)
class TrainedTokenizer:
    """Images to codes and back."""

    network: VQVAE
    levels: tuple[str, ...]
    """Level names, the finest first."""
    image_size: int
    fingerprint: str
    """Hash of the weights and codebooks (`Checkpoint.fingerprint`); code shards carry it."""
    device: torch.device
    bf16: bool = False
    """Whether the networks run under bf16 autocast. As in training, so that both pick identical codes."""

    @torch.no_grad()
    def encode(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.uint16]]:
        """Code grids [B, side, side] by level name, of images uint8 [B, S, S, 3].

        Raises:
            UserError: the images have another size than the tokenizer was trained for.
        """
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise UserError(
                f"images of shape {images.shape[1:]}, the tokenizer takes {(self.image_size, self.image_size, 3)}",
                mend="crop and resize them first",
            )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            codes = self.network.encode(from_uint8(images, self.device))
        return {name: grid.cpu().numpy().astype(np.uint16) for name, grid in zip(self.levels, codes, strict=True)}

    def decode(self, codes: Mapping[str, NDArray[np.integer]]) -> NDArray[np.uint8]:
        """Images uint8 [B, S, S, 3] of code grids by level name."""
        return to_uint8(self._decoded(codes))

    def decode_means(self, codes: Mapping[str, NDArray[np.integer]]) -> NDArray[np.float32]:
        """The same in grey levels that are not rounded, fp32 [B, S, S, 3] in [0, 255]."""
        means: NDArray[np.float32] = to_grey_levels(self._decoded(codes)).contiguous().cpu().numpy()
        return means

    @torch.no_grad()
    def decode_alone(self, codes: Mapping[str, NDArray[np.integer]], level: str) -> NDArray[np.uint8]:
        """What one level carries: images uint8 [B, S, S, 3], every other level at the mean of its own vectors."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return to_uint8(self.network.decode_alone(self._grids(codes), self.levels.index(level)))

    @torch.no_grad()
    def _decoded(self, codes: Mapping[str, NDArray[np.integer]]) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network.decode(self._grids(codes))

    def _grids(self, codes: Mapping[str, NDArray[np.integer]]) -> list[Tensor]:
        return [torch.from_numpy(codes[name].astype(np.int64)).to(self.device) for name in self.levels]


def load_tokenizer(place: str | Path, device: str | torch.device = "cpu") -> TrainedTokenizer:
    """A trained tokenizer, with the averaged weights if it has them.

    Args:
        place: a run directory, whose newest valid checkpoint is taken; or what `vqscale export` has written: a folder
            or a URL, such as `hf://owner/name` for a model on the Hugging Face Hub.
        device: where it goes.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not is_run(place):
        exported = read_exported(place)
        network = build_tokenizer(exported.tokenizer)
        fill(network, place, exported, TOKENIZER)
        return _ready(network, exported.tokenizer, exported.image_size, exported.fingerprint, device)
    layout = RunLayout(Path(place))
    recipe = layout.read_recipe()
    found = require(layout.checkpoints(recipe, "tokenizer"), "tokenizer")
    network = build_tokenizer(recipe.tokenizer)
    fingerprint = load_network(network, found)
    if recipe.tokenizer.ema_decay:
        apply_average(network, found.tensors(f"{EXTRA}/"))
    return _ready(network, recipe.tokenizer, recipe.data.image_size, fingerprint, device)


def _ready(
    network: VQVAE, settings: Tokenizer, image_size: int, fingerprint: str, device: str | torch.device
) -> TrainedTokenizer:
    network.to(device)
    network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    names = tuple(level.name for level in settings.levels)
    bf16 = settings.training.precision == "bf16"
    return TrainedTokenizer(network, names, image_size, fingerprint, torch.device(device), bf16)


def load_prior(place: str | Path, device: str | torch.device = "cpu") -> Prior:
    """A trained prior in evaluation mode; `place` as for `load_tokenizer`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not is_run(place):
        exported = read_exported(place)
        if exported.prior is None:
            raise UserError("holds a tokenizer alone", where=str(place), mend="export a run whose prior is trained")
        shapes = shapes_of(exported.tokenizer, exported.image_size)
        prior = build_prior(exported.prior, shapes, len(exported.classes))
        fill(prior, place, exported, PRIOR)
        return prior.to(device).eval()
    layout = RunLayout(Path(place))
    recipe = layout.read_recipe()
    found = require(layout.checkpoints(recipe, "prior"), "prior")
    network = build_prior(recipe.prior, grid_shapes(recipe), len(class_names(layout, recipe)))
    load_network(network, found)
    return network.to(device).eval()


def class_names(layout: RunLayout, recipe: Recipe) -> tuple[str, ...]:
    """Class names of the run's training data; empty without labels. Needs the codes, not the images."""
    return read_manifest(layout.code_shards(recipe, "train")).classes
