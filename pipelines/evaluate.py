"""Stage `evaluate`: the report of a run, every sample once over all ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.sources import image_source
from pipelines.stage import Stage, run_stage
from vqscale.data.drawn import open_drawn
from vqscale.data.images import encode_png
from vqscale.data.sheet import labelled_sheet
from vqscale.evaluation.hours import HourCounts
from vqscale.evaluation.metrics import mse, psnr
from vqscale.export import TrainedTokenizer, load_tokenizer
from vqscale.files import read_json, write_bytes, write_json
from vqscale.training.checkpoints.fitting import require_prior_of

SHEET_IMAGES = 12


def main(stage: Stage) -> dict[str, Any]:
    """Measure reconstructions of held-out images and, on clocks, the hours that samples show."""
    began = time.time()
    tokenizer = load_tokenizer(stage.layout.root, stage.ranks.device)
    require_prior_of(tokenizer.fingerprint, stage.layout.checkpoints(stage.recipe, "prior"))
    events = stage.events("images/s", 2)
    figures = measure_reconstructions(stage, tokenizer)
    if events:
        events.log(1)
    if stage.recipe.data.clocks:
        figures |= measure_hours(stage)
    if events:
        events.log(2)
        events.close()
    if stage.ranks.first:
        write_json(stage.layout.report, assemble(stage, figures, time.time() - began))
    return {key: value for key, value in figures.items() if isinstance(value, float)}


def measure_reconstructions(stage: Stage, tokenizer: TrainedTokenizer) -> dict[str, Any]:
    """PSNR and MSE (a mean over images) on the held-out shards, and a sheet of inputs above their reconstructions."""
    source = image_source(stage, "validation")
    errors: list[NDArray[np.float64]] = []
    squares = sums = pixels = 0.0
    hours = HourCounts()
    ranks = stage.ranks
    for batch in stage.read_once(source, source.shards.counts):
        images = batch.fields["image"]
        rebuilt = tokenizer.decode(tokenizer.encode(images))
        if not errors and ranks.first:
            _write_sheet(stage.layout.samples, images, rebuilt)
        errors.append(mse(images, rebuilt))
        scaled = images.astype(np.float64) / 255
        squares, sums, pixels = (
            squares + float((scaled**2).sum()),
            sums + float(scaled.sum()),
            pixels + scaled.size,
        )
        if stage.recipe.data.clocks:
            hours.add(rebuilt, batch.fields["label"])
    gathered = stage.ranks.gather((np.concatenate([np.empty(0), *errors]), squares, sums, pixels, hours))
    error = np.concatenate([part[0] for part in gathered])
    squares, sums, pixels = (sum(part[i] for part in gathered) for i in (1, 2, 3))
    figures: dict[str, Any] = {
        "held_out_images": len(error),
        "mse": float(error.mean()),
        "psnr": float(psnr(error).mean()),
        "mse_over_variance": float(error.mean() / (squares / pixels - (sums / pixels) ** 2)),
    }
    if stage.recipe.data.clocks:
        figures["hour_accuracy_reconstructed"] = HourCounts().merge(part[4] for part in gathered).accuracy
    return figures


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
    """The report: what was measured here, what the stages before recorded, and how long each took."""
    done = {name: read_json(stage.layout.done(name)) or {} for name in stage.recipe.stages}
    usage = {k: v for k, v in done["extract"].items() if k.startswith(("usage_", "perplexity_", "codes_differ_"))}
    likelihood = {k: v for k, v in done["prior"].items() if k.startswith(("nats_", "bits_"))}
    times = {name: marker["seconds"] for name, marker in done.items() if "seconds" in marker}
    return {
        "name": stage.recipe.name,
        "run": str(stage.layout.root),
        **figures,
        **usage,
        **likelihood,
        "codes": {level.name: level.codes for level in stage.recipe.tokenizer.levels},
        "seconds": times | {stage.name: round(seconds, 2)},
    }


def _write_sheet(folder: Path, images: NDArray[np.uint8], rebuilt: NDArray[np.uint8]) -> None:
    rows = {"input": images[:SHEET_IMAGES], "reconstruction": rebuilt[:SHEET_IMAGES]}
    write_bytes(folder / "reconstructions.png", encode_png(labelled_sheet(rows)))


if __name__ == "__main__":
    run_stage("evaluate", main)
