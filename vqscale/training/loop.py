"""The one training loop; the tokenizer and the prior are tasks in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import torch

from vqscale.config.training import Training
from vqscale.seeds import mix
from vqscale.training.checkpoints.keeper import Checkpoints
from vqscale.training.data_watch import Counted, DataWatch
from vqscale.training.guards import require_finite, require_progress
from vqscale.training.optimizers import learning_rate
from vqscale.training.preemption import PreemptedError
from vqscale.training.steps import Steps
from vqscale.training.task import Task
from vqscale.training.tracing import Tracer
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch
from vqscale.training.utilisation import TRAINING, compute_figures, memory_figures, peak_tflops
from vqscale.training.vigil import Vigil


class Batches(Counted, Protocol):
    """The loader's batches on the device, as the loop sees them."""

    @property
    def wait_s(self) -> float:
        """Seconds that were spent waiting for batches."""

    def __iter__(self) -> Iterator[DeviceBatch]:
        """Endless batches from the loader's first step on."""


class Loop:
    """Trains a task from a step to the end.

    Args:
        task: model and losses.
        training: the stage's optimisation settings.
        loader: endless batches, the first one belongs to the step that `run` starts at.
        checkpoints: saves the training; the last save has ended when `run` returns.
        watch: judges the data.
        vigil: knows of requests to stop, and is told how things go.
        tracker: on rank 0; None elsewhere.
        seed: the run's.
        tracer: on rank 0, where traces may be asked for.
    """

    def __init__(
        self,
        task: Task,
        training: Training,
        loader: Batches,
        *,
        checkpoints: Checkpoints,
        watch: DataWatch,
        vigil: Vigil,
        tracker: Tracker | None,
        seed: int,
        tracer: Tracer | None = None,
    ) -> None:
        self._task, self._training, self._loader, self._seed = task, training, loader, seed
        self._engine, self._ranks = task.engine, task.engine.ranks
        self._checkpoints, self._watch, self._vigil, self._tracker = checkpoints, watch, vigil, tracker
        self._tracer, self._steps = tracer, Steps(task)
        task.alive = vigil.alive

    def run(self, start: int) -> dict[str, float]:
        """Train behind `start` finished steps; returns the last validation's figures.

        Raises:
            PreemptedError: the stage was asked to stop, and what it has done is saved.
            DivergedError: too many steps in a row had a gradient that is not finite.
        """
        training, task, steps = self._training, self._task, self._engine.steps
        if not steps:
            return self._only_measure()
        if start >= steps:  # everything but the stage's marker was written
            return self._validate(start, tracked=False)
        figures: dict[str, float] = {}
        save_due = False
        self._flops = TRAINING * task.sample_flops()
        self._begin_window()
        self._engine.model.train()
        for step, batch in zip(range(start, steps), self._loader, strict=False):
            # All of torch's randomness (dropout) is a function of seed, step and rank: resuming needs no state of it.
            torch.manual_seed(mix(self._seed, step, self._ranks.rank))
            self._step(batch)
            done, last = step + 1, step + 1 == steps
            signal = self._vigil.asked_to_stop()
            # The last step has to be taken: what a skipped one leaves is not known to be good.
            require_progress(self._steps.in_a_row, 0 if last else training.max_skipped, done)
            if done % training.log_every == 0 or last or done == 1:
                self._log(done)
                self._watch.check()
                self._begin_window()
            aside = time.perf_counter()
            if done % training.hash_every == 0 or last:
                task.check(done)
            if done % training.validate_every == 0 or last:
                figures = self._validate(done)
            if done % training.picture_every == 0 or last or done == 1:
                task.pictures(done, self._tracker)
            save_due |= done % training.checkpoint_every == 0 or last or bool(signal)
            if save_due and not self._steps.in_a_row:
                self._save(done, signal, last)
                save_due = False
            self._began += time.perf_counter() - aside
            self._checkpoints.poll(self._tracker)
        return figures

    def _only_measure(self) -> dict[str, float]:
        """What is left of a training without steps: a checkpoint, figures and pictures."""
        self._checkpoints.save(self._task, 0, self._tracker, final=True)
        figures = self._validate(0)
        self._task.pictures(0, self._tracker)
        return figures

    def _step(self, batch: DeviceBatch) -> None:
        spoil = self._vigil.begin(batch.step)
        self._steps.take(batch, meet=lambda: self._vigil.meet(batch.step), spoil=spoil)
        self._measured += 1
        if self._tracer and (trace := self._tracer.step()):
            print(f"step {batch.step + 1}: trace in {trace}", flush=True)

    def _begin_window(self) -> None:
        """What is measured between two log lines: the time of steps and of waiting for their batches.

        That of validation, pictures, hashes and saves is none of it, so that the speed is that of training.
        """
        self._began, self._waited, self._measured = time.perf_counter(), self._loader.wait_s, 0

    def _log(self, done: int) -> None:
        """Mean losses of the last taken step and bad samples over the ranks, and what the window measured; collective.

        One all-reduce carries all of it.
        """
        loader, watch, pace = self._loader, self._watch, self._vigil.pace
        waited = loader.wait_s - self._waited
        counts, own = watch.counts(loader), pace.own(self._ranks.rank, waited)
        rest = torch.tensor([*counts, *own], dtype=torch.float64, device=self._ranks.device)
        local = torch.cat([*(value.double().view(1) for value in self._steps.losses.values()), rest])
        sums = iter(self._ranks.sum(local).tolist())
        means = {f"loss/{name}": next(sums) / self._ranks.world for name in self._steps.losses}
        watch.update(loader, [next(sums) for _ in counts])
        paces, slow = pace.judge(list(sums), self._measured)
        figures: dict[str, float] = {"optim/skipped": self._steps.skipped}
        if self._steps.losses:
            require_finite(means["loss/total"], self._steps.norm, done)
            figures |= self._task.figures() | {"optim/gradient_norm": self._steps.norm}
        if self._tracker is None:
            return
        if slow:
            print(f"warning: step {done}: {slow}", flush=True)
        seconds = time.perf_counter() - self._began
        figures["optim/learning_rate"] = learning_rate(self._training, done - 1)
        figures["speed/data_wait"] = waited / seconds
        rate = self._measured * self._training.global_batch / seconds
        self._tracker.figures(done, {**means, **figures, **watch.figures(), **paces, **self._use(rate)}, rate=rate)
        if self._tracer:
            self._tracer.look(done)

    def _use(self, rate: float) -> dict[str, float]:
        """What training takes of the machine, at so many samples a second over all ranks."""
        device = self._ranks.device
        compute = compute_figures(self._flops, rate / self._ranks.world, peak_tflops(device)) if self._flops else {}
        speeds = {f"speed/{name}_per_second": rate * count for name, count in self._task.parts.items()}
        return {**speeds, **memory_figures(device), **compute, **self._engine.collective_figures()}

    def _validate(self, done: int, *, tracked: bool = True) -> dict[str, float]:
        self._vigil.doing("validation", done)
        figures = self._task.validate()
        if self._tracker and tracked:
            self._tracker.scalars(done, {f"validation/{name}": value for name, value in figures.items()})
        return figures

    def _save(self, done: int, signal: str, last: bool) -> None:
        """Save, and end here if a signal asks for it."""
        # Whatever was not logged: a checkpoint of weights that are not numbers would push out the good ones.
        require_finite(float(self._steps.losses["total"]), self._steps.norm, done)
        self._vigil.doing("save", done)
        began = time.perf_counter()
        self._checkpoints.save(self._task, done, self._tracker, final=last or bool(signal))
        slow = self._vigil.too_slow(self._checkpoints.longest_s)
        if slow and self._ranks.first:
            print(f"warning: step {done}: {slow}", flush=True)
        if signal and not last:
            raise PreemptedError(done, signal, time.perf_counter() - began)
