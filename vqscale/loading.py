"""Trained models outside of training: load a tokenizer or a prior, of a run or exported, and use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.config.exported import PRIOR, TOKENIZER
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.config.tokenizer_kinds import Tokenizer
from vqscale.data.manifest import read_manifest
from vqscale.errors import UserError
from vqscale.model_files import fill, is_run, read_exported
from vqscale.models.fp32 import exact_fp32
from vqscale.models.latents import centres, draw
from vqscale.models.noise import normals_of
from vqscale.models.pixels import from_uint8, to_grey_levels, to_uint8
from vqscale.models.prior import Prior
from vqscale.models.tokenizer import ImageTokenizer
from vqscale.training.averaging import apply_average
from vqscale.training.build import build_prior, build_tokenizer, grid_shapes
from vqscale.training.checkpoints.reader import load_network, require
from vqscale.training.pieces import EXTRA

Arrays = dict[str, NDArray[Any]]
"""An array for each level, by its name."""


@dataclass(frozen=True)
class TrainedTokenizer:
    """Images to latents and back.

    The latents of a level are codes, integers [B, side, side]; or they are continuous, float32 [B, C, side, side], and
    `encode` gives their posteriors, float32 [B, 2C, side, side]: means, then log deviations.
    """

    network: ImageTokenizer
    levels: tuple[str, ...]
    """Level names, the finest first."""
    image_size: int
    fingerprint: str
    """Hash of the weights and codebooks (`Checkpoint.fingerprint`); code shards carry it."""
    device: torch.device
    bf16: bool = False
    """Whether the networks run under bf16 autocast. As in training, so that both pick identical codes."""

    @torch.no_grad()
    def encode(self, images: NDArray[np.uint8]) -> Arrays:
        """Codes uint16 [B, side, side] or posteriors by level name, of images uint8 [B, S, S, 3].

        Raises:
            UserError: the images have another size than the tokenizer was trained for.
        """
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise UserError(
                f"images of shape {images.shape[1:]}, the tokenizer takes {(self.image_size, self.image_size, 3)}",
                mend="crop and resize them first",
            )
        with self._precision():
            codes = self.network.encode(from_uint8(images, self.device))
        dtype = np.float32 if self.network.continuous else np.uint16
        return {name: grid.cpu().numpy().astype(dtype) for name, grid in zip(self.levels, codes, strict=True)}

    def decode(self, latents: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Images uint8 [B, S, S, 3] of codes or latents by level name."""
        return to_uint8(self._decoded(latents))

    def decode_means(self, latents: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The same in grey levels that are not rounded, fp32 [B, S, S, 3] in [0, 255]."""
        means: NDArray[np.float32] = to_grey_levels(self._decoded(latents)).contiguous().cpu().numpy()
        return means

    def centres(self, encoded: Mapping[str, NDArray[Any]]) -> Arrays:
        """The latents that stand for images, to be decoded: the codes, or the means of their posteriors."""
        return self._arrays(centres(self._tensors(encoded)))

    def rebuild(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What becomes of images uint8 [B, S, S, 3] on the way through latents and back."""
        return self.decode(self.centres(self.encode(images)))

    def draw(
        self, encoded: Mapping[str, NDArray[Any]], images: NDArray[np.uint8]
    ) -> tuple[Arrays, NDArray[np.float64]]:
        """Latents of images, with log q(z | x) [B] in nats: the codes and 0, or a draw that follows from the pixels."""
        tensors = self._tensors(encoded)
        count = sum(own[0].numel() // 2 for own in tensors) if self.network.continuous and len(images) else 0
        drawn = draw(tensors, normals_of(images, count).to(self.device))
        density: NDArray[np.float64] = drawn.log_density.double().cpu().numpy()
        return self._arrays(drawn.latents), density

    @torch.no_grad()
    def decode_alone(self, latents: Mapping[str, NDArray[Any]], level: str) -> NDArray[np.uint8]:
        """What one level carries: images uint8 [B, S, S, 3], every other level at its own mean."""
        with self._precision():
            return to_uint8(self.network.decode_alone(self._tensors(latents), self.levels.index(level)))

    @torch.no_grad()
    def nats(self, images: NDArray[np.uint8], latents: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """-log p(x | z) [B] of images uint8 [B, S, S, 3], where the kind has a likelihood (`network.likelihood`)."""
        with self._precision():
            found = -self.network.log_likelihood(from_uint8(images, self.device), self._tensors(latents))
        nats: NDArray[np.float64] = found.double().cpu().numpy()
        return nats

    @torch.no_grad()
    def _decoded(self, latents: Mapping[str, NDArray[Any]]) -> Tensor:
        with self._precision():
            return self.network.decode(self._tensors(latents))

    def _tensors(self, latents: Mapping[str, NDArray[Any]]) -> list[Tensor]:
        dtype = np.float32 if self.network.continuous else np.int64
        return [torch.from_numpy(latents[name].astype(dtype)).to(self.device) for name in self.levels]

    def _arrays(self, latents: Sequence[Tensor]) -> Arrays:
        return {name: own.cpu().numpy() for name, own in zip(self.levels, latents, strict=True)}

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def load_tokenizer(place: str | Path, device: str | torch.device = "cpu") -> TrainedTokenizer:
    """A trained tokenizer, with the averaged weights if it has them. From here on fp32 is exact on GPUs (`exact_fp32`).

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
    if recipe.tokenizer.average_decay:
        apply_average(network, found.tensors(f"{EXTRA}/"))
    return _ready(network, recipe.tokenizer, recipe.data.image_size, fingerprint, device)


def _ready(
    network: ImageTokenizer, settings: Tokenizer, image_size: int, fingerprint: str, device: str | torch.device
) -> TrainedTokenizer:
    exact_fp32()
    network.to(device)
    network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    names = tuple(level.name for level in settings.levels_of(image_size))
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
        shapes = grid_shapes(exported.levels)
        prior = build_prior(exported.prior, shapes, len(exported.classes))
        fill(prior, place, exported, PRIOR)
        return _ready_prior(prior, device)
    layout = RunLayout(Path(place))
    recipe = layout.read_recipe()
    found = require(layout.checkpoints(recipe, "prior"), "prior")
    network = build_prior(recipe.prior, grid_shapes(recipe.levels), len(class_names(layout, recipe)))
    load_network(network, found)
    return _ready_prior(network, device)


def _ready_prior(prior: Prior, device: str | torch.device) -> Prior:
    exact_fp32()
    return prior.to(device).eval()


def class_names(layout: RunLayout, recipe: Recipe) -> tuple[str, ...]:
    """Class names of the run's training data; empty without labels. Needs the codes, not the images."""
    return read_manifest(layout.code_shards(recipe, "train")).classes
