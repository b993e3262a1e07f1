"""Images through the run's tokenizer, for what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.sources import image_source
from pipelines.stage import Stage
from vqscale.data.image_source import ImageSource
from vqscale.evaluation.image_nats import Fitted, Own, Pixels
from vqscale.evaluation.measures import Shown
from vqscale.evaluation.pixel_fit import PixelLikelihood, fit_pixels
from vqscale.loading import Arrays, TrainedTokenizer

FIT_IMAGES = 1_024
"""Training images that the pixels' distribution is fitted to, the first ones of the shards."""


def held_out(stage: Stage, tokenizer: TrainedTokenizer) -> Iterator[Shown]:
    """This rank's share of the held-out images; over all ranks every image once."""
    source = image_source(stage, "validation")
    for batch in stage.read_once(source, source.shards.counts):
        images = batch.fields["image"]
        encoded, means = _through(tokenizer, images)
        latents, density = tokenizer.draw(encoded, images)
        yield Shown(batch.index, batch.fields["label"], images, encoded, latents, density, means)


def pixels_given_latents(stage: Stage, tokenizer: TrainedTokenizer) -> Pixels:
    """How likely pixels are given their latents: by the tokenizer itself, or by a distribution that is fitted."""
    if tokenizer.network.likelihood:
        return Own(tokenizer.network.likelihood, lambda shown: tokenizer.nats(shown.images, shown.latents))
    return Fitted(fitted_pixels(stage, tokenizer))


def fitted_pixels(stage: Stage, tokenizer: TrainedTokenizer) -> PixelLikelihood:
    """The pixels' distribution around reconstructions of training images, the same on every rank."""
    batch = stage.recipe.evaluate.batch
    images = np.concatenate(list(first_images(image_source(stage, "train"), batch, FIT_IMAGES)))
    means = [_through(tokenizer, images[start : start + batch])[1] for start in range(0, len(images), batch)]
    return fit_pixels(stage.recipe.evaluate.likelihood, images, np.concatenate(means))


def first_images(source: ImageSource, batch: int, count: int) -> Iterator[NDArray[np.uint8]]:
    """The first images of the shards, in parts; fewer where there are not so many."""
    left = count
    for shard in range(len(source.manifest.shards)):
        for fields, _ in source.read_shard(shard, batch, []):
            part = fields["image"][:left]
            left -= len(part)
            if len(part):
                yield part
            if not left:
                return


def _through(tokenizer: TrainedTokenizer, images: NDArray[np.uint8]) -> tuple[Arrays, NDArray[np.float32]]:
    encoded = tokenizer.encode(images)
    return encoded, tokenizer.decode_means(tokenizer.centres(encoded))
