"""What the two training stages share: the loader, the tracker, and the loop from the newest checkpoint on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipelines.stage import Stage
from vqscale.checkpoint.manifest import SUBMITTED
from vqscale.config.load import dump_yaml
from vqscale.config.training import Training
from vqscale.data.loader import Loader
from vqscale.data.memory import aligned
from vqscale.data.order import StreamOrder
from vqscale.data.source import Source
from vqscale.files import read_json
from vqscale.quarantine import Quarantine
from vqscale.training.checkpoints.keeper import Checkpoints
from vqscale.training.dashboard import hyperparameters, layout
from vqscale.training.data_watch import DataWatch
from vqscale.training.guards import DivergedError
from vqscale.training.loop import Loop
from vqscale.training.task import Task
from vqscale.training.tasks import charts
from vqscale.training.tracing import Tracer
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatches, pinned
from vqscale.training.utilisation import describe, peak_tflops
from vqscale.training.vigil import Vigil, vigil


def train_stage(
    stage: Stage,
    task: Task,
    source: Source,
    counts: Sequence[int],
    training: Training,
    unit: str,
    origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train over shards in the canonical order; goes on from the newest valid checkpoint.

    A training that diverges is rolled back to its newest checkpoint, once: whatever a machine got wrong does not happen
    again, and what lies in data and settings does.

    Args:
        stage: the stage that trains.
        task: model and losses.
        source: the training shards.
        counts: samples of each shard.
        training: the stage's optimisation settings.
        unit: what the speed counts, such as `images/s`.
        origin: what checkpoints have to say of the data besides.

    Returns:
        Steps, parameters, bad samples and the last validation's figures.

    Raises:
        PreemptedError: the stage was asked to stop, and what it has done is saved.
        DivergedError: it diverged, and again after it was rolled back.
    """
    recipe, ranks = stage.recipe, stage.ranks
    where = stage.layout.checkpoints(recipe, stage.name)
    made_by = {**_origin(stage), **(origin or {})}
    checkpoints = Checkpoints(task.engine, where, ranks.device, seed=recipe.seed, made_by=made_by, faults=stage.faults)
    with vigil(ranks, stage.watchdog(), stage.faults, stage.lead_s) as watching, checkpoints:
        events = stage.layout.events(stage.name)
        start, notes = checkpoints.resume(task, events)
        head = f"{task.engine.size:,} parameters, {ranks.world} ranks on {ranks.device.type}"
        stage.say(f"{head}, from step {start}", *notes)
        trained = _Training(stage, task, source, counts, training, unit, checkpoints, watching)
        try:
            return trained.run(start, notes)
        except DivergedError as error:
            checkpoints.finish()
            start, notes = checkpoints.resume(task, events)
            if not start:
                raise
            line = f"rolled back to step {start}: {error}"
            stage.say(f"warning: {line}", *notes)
            return trained.run(start, [line, *notes])


@dataclass(frozen=True)
class _Training:
    """A stage's training, which may have to begin twice."""

    stage: Stage
    task: Task
    source: Source
    counts: Sequence[int]
    training: Training
    unit: str
    checkpoints: Checkpoints
    watching: Vigil

    def run(self, start: int, notes: list[str]) -> dict[str, Any]:
        """From a step to the end, with a loader and a tracker that begin there."""
        stage, recipe, ranks = self.stage, self.stage.recipe, self.stage.ranks
        with ExitStack() as closing:
            tracker, tracer = self._tracker(start, notes), self._tracer()
            for shows in (tracker, tracer):
                if shows:
                    closing.callback(shows.close)
            loader = closing.enter_context(self._loader(start))
            quarantine = Quarantine(stage.layout.quarantine(stage.name))
            watch = DataWatch(ranks, recipe.data.error_budget, quarantine, self.source.store)
            loop = Loop(
                *(self.task, self.training, DeviceBatches(loader, ranks.device)),
                checkpoints=self.checkpoints,
                watch=watch,
                vigil=self.watching,
                tracker=tracker,
                seed=recipe.seed,
                tracer=tracer,
            )
            figures = loop.run(start)
            if tracker:
                tracker.outcome(self._settings())
        facts = {"steps": self.task.engine.steps, "parameters": self.task.engine.size, "bad_samples": watch.total}
        return {**facts, **figures}

    def _tracker(self, start: int, notes: list[str]) -> Tracker | None:
        stage = self.stage
        events = stage.events(self.unit, self.task.engine.steps)
        if events is None:
            return None
        tracker = Tracker(stage.layout.tensorboard / stage.name, events, start)
        own, trained = charts(stage.recipe, stage.name), bool(self.task.engine.steps)
        peak = peak_tflops(stage.ranks.device) is not None
        if shown := layout(own, stage.name, trained=trained, world=stage.ranks.world, peak=peak):
            tracker.layout(shown)
        if not start:
            tracker.text("recipe", dump_yaml(stage.recipe))
            tracker.text("machine", describe(stage.ranks.world, stage.ranks.device), kind="text")
        for note in notes:
            tracker.event("resume", start, note=note)
        return tracker

    def _tracer(self) -> Tracer | None:
        where, name = self.stage.layout, self.stage.name
        return Tracer(where.trace_request(name), where.traces(name)) if self.stage.ranks.first else None

    def _settings(self) -> dict[str, bool | float | str]:
        runs_on = {"processes": self.stage.ranks.world, "strategy": self.task.engine.strategy}
        return hyperparameters(self.stage.recipe.model_dump(mode="json"), runs_on)

    def _loader(self, start: int) -> Loader:
        recipe, ranks, data = self.stage.recipe, self.stage.ranks, self.stage.recipe.data
        order = StreamOrder(
            self.counts, seed=recipe.seed, streams=data.streams, packet=data.packet, shuffle=data.shuffle
        )
        return Loader(
            self.source,
            order,
            rank=ranks.rank,
            world=ranks.world,
            global_batch=self.training.global_batch,
            threads=data.threads,
            start_step=start,
            error_budget=1.0,  # judged by the watch, over all ranks at once
            flip=data.flip and "image" in self.source.spec,
            seed=recipe.seed,
            openers=data.openers,
            ahead=int(data.ahead_mb * 2**20),
            allocate=pinned if ranks.device.type == "cuda" else aligned,
        )


def _origin(stage: Stage) -> dict[str, str]:
    """What a checkpoint says of where it comes from."""
    code = read_json(stage.layout.code / "identity.json") or {}
    known = {"recipe": stage.recipe.name, "run": stage.layout.id, "stage": stage.name}
    if stage.layout.submitted:
        known[SUBMITTED] = stage.layout.submitted
    return known | {key: str(code[key]) for key in ("commit", "sources_sha256") if code.get(key)}
