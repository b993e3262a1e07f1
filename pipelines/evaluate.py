"""Stage `evaluate`: the report of a run, every sample once over all ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.classifying import classifier_images
from pipelines.measuring import RECONSTRUCTIONS, measure
from pipelines.sample_folder import SHEET
from pipelines.sources import image_source
from pipelines.stage import Stage, run_stage
from vqscale.config.layout import RunLayout
from vqscale.data.images import decode_whole
from vqscale.data.manifest import CodeLevel
from vqscale.data.order import evaluation_shards
from vqscale.evaluation.markup import Picture
from vqscale.evaluation.page import page
from vqscale.files import read_json, write_bytes, write_json
from vqscale.training.dashboard import hyperparameters
from vqscale.training.tracking import Tracker


def main(stage: Stage) -> dict[str, Any]:
    """Measure held-out images, and the images that were drawn."""
    began, layout, done = time.time(), stage.layout, 0
    events = stage.events("images/s", own_images(stage))

    def seen(count: int) -> None:
        nonlocal done
        done += count
        if events:
            events.log(done, rate=done / (time.time() - began))

    figures = measure(stage, seen)
    numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
    if events:
        write_report(layout.root, layout, assemble(stage, figures, time.time() - began))
        tracker = Tracker(layout.tensorboard / stage.name, events)
        tracker.scalars(0, {f"report/{name}": value for name, value in numbers.items()})
        for picture in _pictures(layout):
            tracker.picture(0, f"report/{picture.name}", decode_whole(picture.png, 1))
        tracker.outcome(hyperparameters(stage.recipe.model_dump(mode="json"), {"processes": stage.ranks.world}))
        tracker.close()
    return numbers


def own_images(stage: Stage) -> int:
    """Images that a rank measures, and that classifiers learn from on it."""
    counts = image_source(stage, "validation").manifest.counts
    own = evaluation_shards(len(counts), stage.ranks.rank, stage.ranks.world)
    return sum(counts[shard] for shard in own) + classifier_images(stage)


def write_report(folder: Path, layout: RunLayout, report: dict[str, Any]) -> None:
    """Write `report.json` and `report.html` into a folder, with the sheets of a run."""
    write_bytes(folder / layout.report_page.name, page(report, _pictures(layout)).encode())
    write_json(folder / layout.report.name, report)


def assemble(stage: Stage, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The report: what was measured here, what the stages before recorded, and how long each took.

    Likelihoods of codes that were measured here, in fp32, take the place of those that the prior's stage found.
    """
    done = {name: read_json(stage.layout.done(name)) or {} for name in stage.recipe.stages}
    usage = {k: v for k, v in done["extract"].items() if k.startswith(("usage_", "perplexity_")) or "_differ_" in k}
    likelihood = {k: v for k, v in done["prior"].items() if k.startswith(("nats_", "bits_"))}
    speed = {f"sampling_{k}": v for k, v in done["sample"].items() if k == "images_per_s"}
    times = {name: marker["seconds"] for name, marker in done.items() if "seconds" in marker}
    return {
        "name": stage.recipe.name,
        "run": str(stage.layout.root),
        **likelihood,
        **figures,
        **usage,
        **speed,
        "evaluate": stage.recipe.evaluate.model_dump(mode="json"),
        **_sizes(stage.recipe.levels),
        "seconds": times | {stage.name: round(seconds, 2)},
    }


def _sizes(levels: Sequence[CodeLevel]) -> dict[str, dict[str, int]]:
    """Codebook size of each level, or the channels of its latents."""
    if levels[0].continuous:
        return {"channels": {level.name: level.channels for level in levels}}
    return {"codes": {level.name: level.codes for level in levels}}


def _pictures(layout: RunLayout) -> list[Picture]:
    """Sheets that are there."""
    known = {"Held-out images and their reconstructions": RECONSTRUCTIONS, "Drawn images": SHEET}
    paths = {caption: layout.samples / name for caption, name in known.items()}
    return [Picture(path.stem, caption, path.read_bytes()) for caption, path in paths.items() if path.exists()]


if __name__ == "__main__":
    run_stage("evaluate", main)
