"""The one training loop; the tokenizer and the prior are tasks in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vqscale.config.recipe import Training
from vqscale.seeds import mix
from vqscale.training import checkpoint
from vqscale.training.checkpoint import Checkpoint
from vqscale.training.data_watch import Counted, DataWatch
from vqscale.training.engine import learning_rate
from vqscale.training.guards import require_finite
from vqscale.training.preemption import PreemptedError
from vqscale.training.task import Task
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch
from vqscale.training.vigil import Vigil, taint


class Batches(Counted, Protocol):
    """The loader's batches on the device, as the loop sees them."""

    @property
    def wait_s(self) -> float:
        """Seconds that were spent waiting for batches."""

    def __iter__(self) -> Iterator[DeviceBatch]:
        """Endless batches from the loader's first step on."""


def resume(task: Task, folder: Path) -> tuple[int, list[str]]:
    """Load the newest valid checkpoint, chosen on rank 0; returns its step (0: none) and what was passed over."""
    engine = task.engine
    found, passed_over = checkpoint.newest(folder) if engine.ranks.first else (None, [])
    # Other ranks must not look for themselves: they could find another one.
    choice = engine.ranks.gather((str(found.path), found.step) if found else None)[0]
    if choice is None:
        return 0, passed_over
    chosen = Checkpoint(Path(choice[0]), choice[1])
    checkpoint.load_into(engine.bare, chosen)
    engine.load_optimizers(chosen.optimizers())
    task.load_extra_state(chosen.extra())
    engine.broadcast()
    return chosen.step, passed_over


class Loop:
    """Trains a task from a step to the end.

    Args:
        task: model and losses.
        training: the stage's optimisation settings.
        loader: endless batches, the first one belongs to the step that `run` starts at.
        folder: where checkpoints go.
        watch: judges the data.
        vigil: knows of requests to stop, and is told how things go.
        tracker: on rank 0; None elsewhere.
        seed: the run's.
    """

    def __init__(
        self,
        task: Task,
        training: Training,
        loader: Batches,
        *,
        folder: Path,
        watch: DataWatch,
        vigil: Vigil,
        tracker: Tracker | None,
        seed: int,
    ) -> None:
        self._task, self._training, self._loader, self._seed = task, training, loader, seed
        self._engine, self._ranks = task.engine, task.engine.ranks
        self._folder, self._watch, self._vigil, self._tracker = folder, watch, vigil, tracker

    def run(self, start: int) -> dict[str, float]:
        """Train behind `start` finished steps; returns the last validation's figures.

        Raises:
            PreemptedError: the stage was asked to stop, and what it has done is saved.
        """
        training, task = self._training, self._task
        if start >= training.steps:  # everything but the stage's marker was written
            return self._validate(start, tracked=False)
        figures: dict[str, float] = {}
        self._begin_window()
        self._engine.model.train()
        for step, batch in zip(range(start, training.steps), self._loader, strict=False):
            losses, norm = self._step(step, batch)
            done, last = step + 1, step + 1 == training.steps
            signal = self._vigil.asked_to_stop()
            if done % training.log_every == 0 or last or done == 1:
                self._log(losses, norm, done)
                self._watch.check()
                self._begin_window()
            if done % training.hash_every == 0 or last:
                task.check(done)
            if done % training.validate_every == 0 or last:
                figures = self._validate(done)
            if self._tracker and (done % training.picture_every == 0 or last or done == 1):
                task.pictures(done, self._tracker)
            if done % training.checkpoint_every == 0 or last or signal:
                # Whatever was not logged: a checkpoint of weights that are not numbers would push out the good ones.
                require_finite(float(losses["total"].detach()), float(norm), done)
                save_s = self._save(done)
                if signal and not last:
                    raise PreemptedError(done, signal, save_s)
        return figures

    def _step(self, step: int, batch: DeviceBatch) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; returns the losses by name and the gradient norm."""
        # All of torch's randomness (dropout) is a function of seed, step and rank: resuming needs no generator state.
        torch.manual_seed(mix(self._seed, step, self._ranks.rank))
        due = self._vigil.begin(step)
        self._task.before_step(batch)
        losses = self._task.losses(batch)
        self._vigil.meet(step)
        norm = self._engine.optimise(taint(losses["total"], due), step)
        self._task.after_step()
        self._steps += 1
        return losses, norm

    def _begin_window(self) -> None:
        """What is measured between two log lines."""
        self._began, self._waited, self._steps = time.perf_counter(), self._loader.wait_s, 0

    def _log(self, losses: dict[str, Tensor], norm: Tensor, done: int) -> None:
        """Mean losses and bad samples over the ranks, and what the window measured; collective, in one all-reduce."""
        loader, watch, pace = self._loader, self._watch, self._vigil.pace
        waited = loader.wait_s - self._waited
        parts = [
            [float(value.detach()) for value in losses.values()],
            watch.counts(loader),
            pace.own(self._ranks.rank, waited),
        ]
        device = self._ranks.device
        local = torch.tensor([value for part in parts for value in part], dtype=torch.float64, device=device)
        summed = iter(self._ranks.sum(local).tolist())
        totals, counts, own = ([next(summed) for _ in part] for part in parts)
        watch.update(loader, counts)
        means = {name: total / self._ranks.world for name, total in zip(losses, totals, strict=True)}
        require_finite(means["total"], float(norm), done)
        figures = self._task.figures()
        paces, slow = pace.judge(own, self._steps)
        if self._tracker is None:
            return
        if slow:
            print(f"warning: step {done}: {slow}", flush=True)
        seconds = time.perf_counter() - self._began
        optim = {
            "optim/learning_rate": learning_rate(self._training, done - 1),
            "optim/gradient_norm": float(norm),
            "speed/data_wait": waited / seconds,
        }
        named = {f"loss/{name}": value for name, value in means.items()}
        rate = self._steps * self._training.global_batch / seconds
        self._tracker.figures(done, {**named, **figures, **watch.figures(), **optim, **paces}, rate=rate)

    def _validate(self, done: int, *, tracked: bool = True) -> dict[str, float]:
        self._vigil.doing("validation", done)
        self._engine.model.eval()
        with torch.no_grad():
            figures = self._task.validate()
        self._engine.model.train()
        if self._tracker and tracked:
            self._tracker.scalars(done, {f"validation/{name}": value for name, value in figures.items()})
        return figures

    def _save(self, step: int) -> float:
        """Commit a checkpoint; returns the seconds that it took."""
        self._vigil.doing("save", step)
        began = time.perf_counter()
        extra = self._task.extra_state()
        self._vigil.faults.at("before-save", step)
        if self._ranks.first:
            model, optimizers = self._engine.bare.state_dict(), self._engine.optimizer_states()
            checkpoint.save(self._folder, step, model, optimizers, self._training.keep, extra)
        self._vigil.faults.at("after-save", step)
        seconds = time.perf_counter() - began
        slow = self._vigil.too_slow(seconds)
        if slow and self._ranks.first:
            print(f"warning: step {step}: {slow}", flush=True)
        return seconds
