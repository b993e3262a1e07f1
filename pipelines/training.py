"""What the two training stages share: the loader, the tracker, and the loop from the newest checkpoint on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import Any

import numpy as np

from pipelines.stage import Stage
from vqscale.config.load import dump_yaml
from vqscale.config.recipe import Training
from vqscale.data.loader import Loader
from vqscale.data.order import StreamOrder
from vqscale.data.source import Source
from vqscale.quarantine import Quarantine
from vqscale.training.data_watch import DataWatch
from vqscale.training.loop import Loop, resume
from vqscale.training.task import Task
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatches, pinned
from vqscale.training.vigil import vigil


def train_stage(
    stage: Stage, task: Task, source: Source, counts: Sequence[int], training: Training, unit: str
) -> dict[str, Any]:
    """Train over shards in the canonical order; goes on from the newest valid checkpoint.

    Args:
        stage: the stage that trains.
        task: model and losses.
        source: the training shards.
        counts: samples of each shard.
        training: the stage's optimisation settings.
        unit: what the speed counts, such as `images/s`.

    Returns:
        Steps, parameters, bad samples and the last validation's figures.
    """
    recipe, ranks = stage.recipe, stage.ranks
    data, folder = recipe.data, stage.layout.checkpoints(stage.name)
    start, notes = resume(task, folder)
    size = task.engine.size
    stage.say(f"{size:,} parameters, {ranks.world} ranks on {ranks.device.type}, from step {start}", *notes)
    order = StreamOrder(counts, seed=recipe.seed, streams=data.streams, packet=data.packet, shuffle=data.shuffle)
    events = stage.events(unit, training.steps)
    tracker = Tracker(stage.layout.tensorboard / stage.name, events, start) if events else None
    if tracker and not start:
        tracker.text("recipe", dump_yaml(recipe))
    closing_tracker = closing(tracker) if tracker else nullcontext()
    with (
        closing_tracker,
        vigil(ranks, stage.watchdog(), stage.faults, stage.lead_s) as watching,
        Loader(
            source,
            order,
            rank=ranks.rank,
            world=ranks.world,
            global_batch=training.global_batch,
            threads=data.threads,
            start_step=start,
            error_budget=1.0,  # judged below, over all ranks at once
            flip=data.flip and "image" in source.spec,
            seed=recipe.seed,
            openers=data.openers,
            ahead=int(data.ahead_mb * 2**20),
            allocate=pinned if ranks.device.type == "cuda" else np.empty,
        ) as loader,
    ):
        watch = DataWatch(ranks, data.error_budget, Quarantine(stage.layout.quarantine(stage.name)), source.store)
        batches = DeviceBatches(loader, ranks.device)
        loop = Loop(
            *(task, training, batches),
            folder=folder,
            watch=watch,
            vigil=watching,
            tracker=tracker,
            seed=recipe.seed,
        )
        figures = loop.run(start)
    return {"steps": training.steps, "parameters": size, "bad_samples": watch.total, **figures}
