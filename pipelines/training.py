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
from vqscale.files import read_json
from vqscale.quarantine import Quarantine
from vqscale.training.checkpoints.keeper import Checkpoints
from vqscale.training.data_watch import DataWatch
from vqscale.training.loop import Task, train
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatches, pinned


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
    data, where = recipe.data, stage.layout.checkpoints(recipe, stage.name)
    checkpoints = Checkpoints(task.engine, where, ranks.device, seed=recipe.seed, made_by=_origin(stage))
    start, notes = checkpoints.resume(task)
    size = sum(parameter.numel() for parameter in task.engine.bare.parameters())
    stage.say(f"{size:,} parameters, {ranks.world} ranks on {ranks.device.type}, from step {start}", *notes)
    order = StreamOrder(counts, seed=recipe.seed, streams=data.streams, packet=data.packet, shuffle=data.shuffle)
    events = stage.events(unit, training.steps)
    tracker = Tracker(stage.layout.tensorboard / stage.name, events, start) if events else None
    if tracker and not start:
        tracker.text("recipe", dump_yaml(recipe))
    if tracker:
        for note in notes:
            tracker.event("resume", start, note=note)
    closing_tracker = closing(tracker) if tracker else nullcontext()
    with (
        closing_tracker,
        checkpoints,
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
        figures = train(
            task,
            training,
            batches,
            start=start,
            seed=recipe.seed,
            checkpoints=checkpoints,
            watch=watch,
            tracker=tracker,
        )
    return {"steps": training.steps, "parameters": size, "bad_samples": watch.total, **figures}


def _origin(stage: Stage) -> dict[str, str]:
    """What a checkpoint says of where it comes from."""
    code = read_json(stage.layout.code / "identity.json") or {}
    known = {"recipe": stage.recipe.name, "run": stage.layout.id, "stage": stage.name}
    return known | {key: str(code[key]) for key in ("commit", "sources_sha256") if code.get(key)}
