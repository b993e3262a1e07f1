"""Held-out images once through the tokenizer, and what is measured of them: reconstructions and likelihoods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.sources import image_source
from pipelines.stage import Stage
from vqscale.data.image_source import ImageSource
from vqscale.data.labels import NO_LABEL
from vqscale.data.loader import Batch
from vqscale.evaluation.hours import HourCounts
from vqscale.evaluation.likelihood import LevelCodes, PixelLikelihood, fit_pixels, prior_figures, uniform_figures
from vqscale.evaluation.metrics import Doubles, mse, psnr
from vqscale.export import TrainedTokenizer
from vqscale.models.prior import Prior
from vqscale.training.build import grid_shapes

FIT_IMAGES = 1_024
"""Training images that the pixels' distribution is fitted to, the first ones of the shards."""


class Rebuilt(NamedTuple):
    """Some held-out images, and what the tokenizer makes of them."""

    batch: Batch
    codes: dict[str, NDArray[np.uint16]]
    means: NDArray[np.float32]
    """Reconstructions fp32 [n, S, S, 3] in grey levels, not rounded."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The reconstructions as images."""
        return np.rint(self.means).astype(np.uint8)


def rebuild(stage: Stage, tokenizer: TrainedTokenizer) -> Iterator[Rebuilt]:
    """This rank's share of the held-out images; over all ranks every image once."""
    source = image_source(stage, "validation")
    for batch in stage.read_once(source, source.shards.counts):
        yield Rebuilt(batch, *_through(tokenizer, batch.fields["image"]))


class Reconstructions:
    """PSNR and MSE, a mean over images; on clocks, the hours that they show.

    Args:
        clocks: whether the images are clocks.
    """

    def __init__(self, clocks: bool) -> None:
        self._hours = HourCounts() if clocks else None
        self._errors: list[Doubles] = [np.empty(0)]
        self._sums = np.zeros(3)  # of squares, values, and how many; in [0, 1]

    def add(self, rebuilt: Rebuilt) -> None:
        """Count some images."""
        images = rebuilt.batch.fields["image"]
        self._errors.append(mse(images, rebuilt.pixels))
        scaled = images.astype(np.float64) / 255
        self._sums += (scaled**2).sum(), scaled.sum(), scaled.size
        if self._hours:
            self._hours.add(rebuilt.pixels, rebuilt.batch.fields["label"])

    def figures(self, stage: Stage) -> dict[str, Any]:
        """Over all ranks; collective."""
        gathered = stage.ranks.gather((np.concatenate(self._errors), self._sums, self._hours))
        error = np.concatenate([part[0] for part in gathered])
        squares, sums, pixels = sum(part[1] for part in gathered)
        found: dict[str, Any] = {
            "held_out_images": len(error),
            "mse": float(error.mean()),
            "psnr": float(psnr(error).mean()),
            "mse_over_variance": float(error.mean() / (squares / pixels - (sums / pixels) ** 2)),
        }
        if self._hours:
            found["hour_accuracy_reconstructed"] = HourCounts().merge(part[2] for part in gathered).accuracy
        return found


class Likelihoods:
    """-log p(x | z_q) and -log p(z_q) of every image, with its class given where it has one.

    Args:
        pixels: the distribution of pixels around the reconstruction.
        tokenizer: the one that made the codes.
        prior: in evaluation mode, and computes in fp32; without one, only the uniform baseline is measured.
    """

    def __init__(self, pixels: PixelLikelihood, tokenizer: TrainedTokenizer, prior: Prior | None) -> None:
        self._pixels, self._prior, self._device = pixels, prior, tokenizer.device
        self._levels = tokenizer.levels[::-1]
        self._found: list[Doubles] = [np.empty((0, 2 + (len(self._levels) if prior else 0)))]

    def add(self, rebuilt: Rebuilt) -> None:
        """Count some images."""
        images, index = rebuilt.batch.fields["image"], rebuilt.batch.index
        code_nats = self._code_nats(self._prior, rebuilt) if self._prior else []
        self._found.append(np.stack([index, self._pixels.nats(images, rebuilt.means), *code_nats], axis=1))

    @torch.no_grad()
    def _code_nats(self, prior: Prior, rebuilt: Rebuilt) -> list[Doubles]:
        """A value an image for each level, the coarsest first."""
        codes = [torch.from_numpy(rebuilt.codes[name].astype(np.int64)).to(self._device) for name in self._levels]
        labels = torch.from_numpy(rebuilt.batch.fields["label"]).to(self._device)
        classes = torch.where(labels == NO_LABEL, prior.no_class, labels).clamp(max=prior.no_class)
        return [nats.double().cpu().numpy() for nats in prior(codes, classes)]

    def figures(self, stage: Stage) -> dict[str, Any]:
        """Over all ranks; collective. The images are taken in their order, whoever measured them."""
        found = np.concatenate(stage.ranks.gather(np.concatenate(self._found)))
        _, pixels, *columns = found[np.argsort(found[:, 0])].T
        grids = zip(self._levels, grid_shapes(stage.recipe), strict=True)
        codes = {name: LevelCodes(grid.length, grid.codes) for name, grid in grids}
        dimensions = 3 * stage.recipe.data.image_size**2
        figures: dict[str, Any] = {
            "pixel_likelihood": self._pixels.family,
            "pixel_scale": [round(scale, 4) for scale in self._pixels.scale],
            **uniform_figures(pixels, codes, dimensions),
        }
        if self._prior:
            code_nats = dict(zip(self._levels, columns, strict=True))
            figures |= prior_figures(pixels, code_nats, codes, dimensions)
            figures["codes_likelihood"] = "exact" if self._prior.exact else "bound"
        return figures


def fitted_pixels(stage: Stage, tokenizer: TrainedTokenizer) -> PixelLikelihood:
    """The pixels' distribution around reconstructions of training images, the same on every rank."""
    images = _first_images(image_source(stage, "train"), stage.recipe.evaluate.batch)
    batch = stage.recipe.evaluate.batch
    means = [_through(tokenizer, images[start : start + batch])[1] for start in range(0, len(images), batch)]
    return fit_pixels(stage.recipe.evaluate.likelihood, images, np.concatenate(means))


def _first_images(source: ImageSource, batch: int) -> NDArray[np.uint8]:
    held: list[NDArray[np.uint8]] = []
    for shard in range(len(source.manifest.shards)):
        for fields, _ in source.read_shard(shard, batch, []):
            held.append(fields["image"])
            if sum(map(len, held)) >= FIT_IMAGES:
                return np.concatenate(held)[:FIT_IMAGES]
    return np.concatenate(held)


def _through(
    tokenizer: TrainedTokenizer, images: NDArray[np.uint8]
) -> tuple[dict[str, NDArray[np.uint16]], NDArray[np.float32]]:
    codes: Mapping[str, NDArray[np.uint16]] = tokenizer.encode(images)
    return dict(codes), tokenizer.decode_means(codes)
