"""The classification accuracy score of a run: classifiers that learn from its images, tested on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.sources import image_source
from pipelines.stage import Stage
from vqscale.config.classifier import Classifier
from vqscale.data.drawn import RECORD, DrawnSet, open_drawn
from vqscale.data.image_source import ImageSource
from vqscale.errors import UserError
from vqscale.evaluation.accuracy import Share, accuracy, train_classifier
from vqscale.loading import TrainedTokenizer

Change = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


def classifier_images(stage: Stage) -> int:
    """Images that classifiers learn from on each rank, over all their steps, about; 0 where none is wanted."""
    wanted = stage.recipe.evaluate.classifier
    return len(_sets(stage, wanted)) * wanted.steps * wanted.global_batch // stage.ranks.world if wanted else 0


def measure_classifiers(
    stage: Stage, wanted: Classifier, tokenizer: TrainedTokenizer, seen: Callable[[int], None]
) -> dict[str, Any]:
    """Accuracy on the held-out images after each set; collective.

    Raises:
        UserError: the images have no classes, or the drawn ones are of others.
    """
    source, names = image_source(stage, "train"), _sets(stage, wanted)
    drawn = open_drawn(stage.layout.samples) if "samples" in names else None
    classes = _require_classes(source, drawn)
    count = min(wanted.images, source.manifest.samples, len(drawn.labels) if drawn else wanted.images)
    share: dict[str, Callable[[], Share]] = {
        "samples": lambda: _of_drawn(stage, count),
        "reconstructions": lambda: _of_training(stage, source, count, tokenizer.rebuild),
        "images": lambda: _of_training(stage, source, count),
    }
    figures: dict[str, Any] = {}
    for name in names:
        part = share[name]()
        flip, seed = stage.recipe.data.flip, stage.recipe.seed
        network = train_classifier(wanted, part, classes, stage.ranks, seed=seed, flip=flip, seen=seen)
        found = accuracy(network, _held_out(stage), classes, stage.ranks)
        figures[f"cas_{name}"] = found.top1
        figures |= {} if found.top5 is None else {f"cas_{name}_top5": found.top5}
        figures[f"cas_{name}_images"] = sum(stage.ranks.gather(len(part.labels)))
        figures["cas_held_out_images"] = found.images
    return figures


def _sets(stage: Stage, wanted: Classifier) -> Sequence[str]:
    """The sets that there are: without a prior nothing was drawn."""
    there = (stage.layout.samples / RECORD).exists()
    return [name for name in wanted.sets if name != "samples" or there]


def _require_classes(source: ImageSource, drawn: DrawnSet | None) -> int:
    names = source.manifest.classes
    if len(names) < 2:
        what = "the images have one class" if names else "the images have no classes"
        raise UserError(what, where="evaluate.classifier", mend="leave it null")
    if drawn and drawn.classes != names:
        raise UserError("the drawn images have other classes", where=str(drawn.folder), mend="draw again")
    return len(names)


def _of_drawn(stage: Stage, count: int) -> Share:
    drawn = open_drawn(stage.layout.samples)
    numbers = np.arange(stage.ranks.rank, count, stage.ranks.world)
    return _labelled(numbers, drawn.read(numbers.tolist()), np.array(drawn.labels, np.int64)[numbers])


def _of_training(stage: Stage, source: ImageSource, count: int, change: Change = lambda images: images) -> Share:
    """The first training images, changed; fewer than `count` where some are bad or have no class."""
    size = source.size
    numbers, images = np.empty(0, np.int64), np.empty((0, size, size, 3), np.uint8)
    parts = [(numbers, images, numbers)]
    for batch in stage.read_once(source, shards_of(source.shards.counts, count)):
        first = batch.index < count
        if first.any():
            kept = change(batch.fields["image"][first])
            parts.append((batch.index[first], kept, batch.fields["label"][first]))
    return _labelled(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _labelled(numbers: NDArray[np.int64], images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Share:
    known = labels >= 0
    return Share(numbers[known], images[known], labels[known])


def _held_out(stage: Stage) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    source = image_source(stage, "validation")
    for batch in stage.read_once(source, source.shards.counts):
        yield batch.fields["image"], batch.fields["label"]


def shards_of(counts: Sequence[int], images: int) -> list[int]:
    """Samples of the first shards, of as many as hold so many images."""
    return [count for count, before in zip(counts, accumulate(counts, initial=0), strict=False) if before < images]
