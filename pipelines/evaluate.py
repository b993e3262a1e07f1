"""Stage `evaluate`: the report of a run, every sample once over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines.drawing import SHEET
from pipelines.held_out import fitted_pixels, held_out
from pipelines.sources import image_source
from pipelines.stage import Stage, run_stage
from vqscale.checkpoint.folder import steps
from vqscale.config.layout import RunLayout
from vqscale.data.drawn import RECORD, DrawnSet, open_drawn
from vqscale.data.images import encode_png
from vqscale.data.sheet import labelled_sheet
from vqscale.evaluation.features import FeatureNetwork, load_features
from vqscale.evaluation.hours import HourCounts
from vqscale.evaluation.likelihood import LevelCodes
from vqscale.evaluation.likelihoods import Likelihoods
from vqscale.evaluation.measures import CodeStatistics, FeatureDistance, Measure
from vqscale.evaluation.page import Picture, page
from vqscale.evaluation.reconstructions import Reconstructions
from vqscale.evaluation.samples import SampleQuality
from vqscale.export import TrainedTokenizer, load_prior, load_tokenizer
from vqscale.files import read_json, write_bytes, write_json
from vqscale.models.lpips import load_lpips
from vqscale.models.prior import Prior
from vqscale.training.build import grid_shapes
from vqscale.training.checkpoints.fitting import require_prior_of
from vqscale.training.dashboard import leaves
from vqscale.training.tracking import Tracker

SHEET_IMAGES = 12
RECONSTRUCTIONS = "reconstructions.png"


def main(stage: Stage) -> dict[str, Any]:
    """Measure held-out images, and the images that were drawn."""
    began = time.time()
    layout, recipe = stage.layout, stage.recipe
    tokenizer = load_tokenizer(layout.root, stage.ranks.device)
    priors = layout.checkpoints(recipe, "prior")
    require_prior_of(tokenizer.fingerprint, priors)
    prior = load_prior(layout.root, stage.ranks.device) if steps(priors) else None
    network = load_features(recipe.evaluate.features, stage.ranks.device) if recipe.evaluate.features else None
    events = stage.events("images/s", 2)
    figures = measure_held_out(stage, tokenizer, prior, network)
    if events:
        events.log(1)
    figures |= measure_samples(stage, network)
    numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
    if events:
        events.log(2)
        report = assemble(stage, figures, time.time() - began)
        write_json(layout.report, report)
        write_bytes(layout.report_page, page(report, _pictures(layout)).encode())
        tracker = Tracker(layout.tensorboard / stage.name, events)
        tracker.scalars(0, numbers)
        tracker.outcome(dict(leaves(recipe.model_dump(mode="json"))), numbers)
        tracker.close()
    return numbers


def measure_held_out(
    stage: Stage, tokenizer: TrainedTokenizer, prior: Prior | None, network: FeatureNetwork | None = None
) -> dict[str, Any]:
    """All measures of the held-out images, and a sheet of inputs above their reconstructions."""
    measures = _measures(stage, tokenizer, prior, network)
    for number, shown in enumerate(held_out(stage, tokenizer)):
        if number == 0 and stage.ranks.first:
            _write_sheet(stage.layout.samples, shown.images, shown.pixels)
        for measure in measures:
            measure.add(shown)
    figures = {name: value for measure in measures for name, value in measure.figures(stage.ranks).items()}
    learned = figures.get("bits_per_dim_codes")
    dimensions = 3 * stage.recipe.data.image_size**2
    return figures | ({} if learned is None else {"code_bits_learned": learned * dimensions})


def _measures(
    stage: Stage, tokenizer: TrainedTokenizer, prior: Prior | None, network: FeatureNetwork | None
) -> list[Measure]:
    """What the recipe wants measured; every one of them is shown all held-out images."""
    recipe, size, device = stage.recipe, stage.recipe.data.image_size, stage.ranks.device
    lpips = load_lpips(recipe.evaluate.lpips_paths, "evaluate.lpips").to(device) if recipe.evaluate.lpips else None
    books: list[Tensor] = [book.codes for book in tokenizer.network.codebooks]  # type: ignore[misc]
    shapes = dict(zip(tokenizer.levels[::-1], grid_shapes(recipe), strict=True))
    codes = {name: LevelCodes(shape.length, shape.codes) for name, shape in shapes.items()}
    levels = {name: (book, shapes[name].side) for name, book in zip(tokenizer.levels, books, strict=True)}
    measures: list[Measure] = [
        Reconstructions(size, clocks=bool(recipe.data.clocks), lpips=lpips),
        Likelihoods(fitted_pixels(stage, tokenizer), codes, size, prior, device),
        CodeStatistics(levels),
    ]
    return [*measures, FeatureDistance(network, size)] if network else measures


def measure_samples(stage: Stage, network: FeatureNetwork | None) -> dict[str, Any]:
    """On clocks the hours that drawn images show; with a feature network how good and how varied they are."""
    if not (stage.layout.samples / RECORD).exists() and not stage.recipe.data.clocks:
        return {}
    drawn = open_drawn(stage.layout.samples)
    figures: dict[str, Any] = {"samples": len(drawn.labels)}
    if stage.recipe.data.clocks:
        figures |= measure_hours(stage, drawn)
    return figures | (measure_quality(stage, drawn, network) if network else {})


def measure_hours(stage: Stage, drawn: DrawnSet) -> dict[str, Any]:
    """Read the hour of every drawn image and compare it with the class that was asked for."""
    counts = HourCounts()
    for numbers in _shares(stage, len(drawn.labels)):
        counts.add(drawn.read(numbers), np.array([drawn.labels[number] for number in numbers]))
    total = HourCounts().merge(stage.ranks.gather(counts))
    return {
        "hour_accuracy": total.accuracy,
        "hour_accuracy_by_hour": total.by_hour(),
        "samples_per_hour": int(total.images.min()),
        "samples_unreadable": int(total.unreadable.sum()),
    }


def measure_quality(stage: Stage, drawn: DrawnSet, network: FeatureNetwork) -> dict[str, Any]:
    """FID, Inception Score, precision and recall against the reference that the recipe names."""
    wanted, size = stage.recipe.evaluate, stage.recipe.data.image_size
    quality = SampleQuality(network, size, wanted.compared_images)
    for numbers in _shares(stage, len(drawn.labels)):
        quality.add(drawn.read(numbers), np.asarray(numbers), reference=False)
    source = image_source(stage, wanted.reference)
    for batch in stage.read_once(source, _shards_of(source.shards.counts, wanted.reference_images)):
        first = batch.index < wanted.reference_images
        if first.any():
            quality.add(batch.fields["image"][first], batch.index[first], reference=True)
    return quality.figures(stage.ranks, wanted.reference)


def _shards_of(counts: Sequence[int], images: int) -> list[int]:
    """Samples of the first shards, of as many as hold so many images."""
    return [count for count, before in zip(counts, accumulate(counts, initial=0), strict=False) if before < images]


def _shares(stage: Stage, count: int) -> Iterator[range]:
    """This rank's share of so many drawn images, in batches of numbers."""
    mine, batch = range(stage.ranks.rank, count, stage.ranks.world), stage.recipe.evaluate.batch
    return (mine[start : start + batch] for start in range(0, len(mine), batch))


def assemble(stage: Stage, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The report: what was measured here, what the stages before recorded, and how long each took.

    Likelihoods of codes that were measured here, in fp32, take the place of those that the prior's stage found.
    """
    done = {name: read_json(stage.layout.done(name)) or {} for name in stage.recipe.stages}
    usage = {k: v for k, v in done["extract"].items() if k.startswith(("usage_", "perplexity_", "codes_differ_"))}
    likelihood = {k: v for k, v in done["prior"].items() if k.startswith(("nats_", "bits_"))}
    times = {name: marker["seconds"] for name, marker in done.items() if "seconds" in marker}
    return {
        "name": stage.recipe.name,
        "run": str(stage.layout.root),
        **likelihood,
        **figures,
        **usage,
        "codes": {level.name: level.codes for level in stage.recipe.tokenizer.levels},
        "seconds": times | {stage.name: round(seconds, 2)},
    }


def _pictures(layout: RunLayout) -> list[Picture]:
    """Sheets that are there."""
    known = {"Held-out images and their reconstructions": RECONSTRUCTIONS, "Drawn images": SHEET}
    paths = {caption: layout.samples / name for caption, name in known.items()}
    return [Picture(caption, path.read_bytes()) for caption, path in paths.items() if path.exists()]


def _write_sheet(folder: Path, images: NDArray[np.uint8], rebuilt: NDArray[np.uint8]) -> None:
    rows = {"input": images[:SHEET_IMAGES], "reconstruction": rebuilt[:SHEET_IMAGES]}
    write_bytes(folder / RECONSTRUCTIONS, encode_png(labelled_sheet(rows)))


if __name__ == "__main__":
    run_stage("evaluate", main)
