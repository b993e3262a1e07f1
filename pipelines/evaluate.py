"""Stage `evaluate`: the report of a run, every sample once over all ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.held_out import Likelihoods, Reconstructions, fitted_pixels, rebuild
from pipelines.stage import Stage, run_stage
from vqscale.checkpoint.folder import steps
from vqscale.data.drawn import open_drawn
from vqscale.data.images import encode_png
from vqscale.data.sheet import labelled_sheet
from vqscale.evaluation.hours import HourCounts
from vqscale.export import TrainedTokenizer, load_prior, load_tokenizer
from vqscale.files import read_json, write_bytes, write_json
from vqscale.models.prior import Prior
from vqscale.training.checkpoints.fitting import require_prior_of
from vqscale.training.dashboard import leaves
from vqscale.training.tracking import Tracker

SHEET_IMAGES = 12


def main(stage: Stage) -> dict[str, Any]:
    """Measure held-out images and, on clocks, the hours that samples show."""
    began = time.time()
    layout, recipe = stage.layout, stage.recipe
    tokenizer = load_tokenizer(layout.root, stage.ranks.device)
    priors = layout.checkpoints(recipe, "prior")
    require_prior_of(tokenizer.fingerprint, priors)
    prior = load_prior(layout.root, stage.ranks.device) if steps(priors) else None
    events = stage.events("images/s", 2)
    figures = measure_held_out(stage, tokenizer, prior)
    if events:
        events.log(1)
    if recipe.data.clocks:
        figures |= measure_hours(stage)
    numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
    if events:
        events.log(2)
        write_json(layout.report, assemble(stage, figures, time.time() - began))
        tracker = Tracker(layout.tensorboard / stage.name, events)
        tracker.scalars(0, numbers)
        tracker.outcome(dict(leaves(recipe.model_dump(mode="json"))), numbers)
        tracker.close()
    return numbers


def measure_held_out(stage: Stage, tokenizer: TrainedTokenizer, prior: Prior | None) -> dict[str, Any]:
    """Reconstructions and likelihoods of the held-out images, and a sheet of inputs above their reconstructions."""
    measures = (
        Reconstructions(bool(stage.recipe.data.clocks)),
        Likelihoods(fitted_pixels(stage, tokenizer), tokenizer, prior),
    )
    for number, rebuilt in enumerate(rebuild(stage, tokenizer)):
        if number == 0 and stage.ranks.first:
            _write_sheet(stage.layout.samples, rebuilt.batch.fields["image"], rebuilt.pixels)
        for measure in measures:
            measure.add(rebuilt)
    return {name: value for measure in measures for name, value in measure.figures(stage).items()}


def measure_hours(stage: Stage) -> dict[str, Any]:
    """Read the hour of every sample and compare it with the class that was asked for."""
    drawn = open_drawn(stage.layout.samples)
    mine = range(stage.ranks.rank, len(drawn.labels), stage.ranks.world)
    counts = HourCounts()
    for start in range(0, len(mine), stage.recipe.evaluate.batch):
        part = mine[start : start + stage.recipe.evaluate.batch]
        counts.add(drawn.read(part), np.array([drawn.labels[number] for number in part]))
    total = HourCounts().merge(stage.ranks.gather(counts))
    return {
        "hour_accuracy": total.accuracy,
        "hour_accuracy_by_hour": total.by_hour(),
        "samples_per_hour": int(total.images.min()),
        "samples_unreadable": int(total.unreadable.sum()),
    }


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


def _write_sheet(folder: Path, images: NDArray[np.uint8], rebuilt: NDArray[np.uint8]) -> None:
    rows = {"input": images[:SHEET_IMAGES], "reconstruction": rebuilt[:SHEET_IMAGES]}
    write_bytes(folder / "reconstructions.png", encode_png(labelled_sheet(rows)))


if __name__ == "__main__":
    run_stage("evaluate", main)
