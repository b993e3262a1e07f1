"""The one training loop; the tokenizer and the prior are tasks in it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vqscale.config.recipe import Training
from vqscale.seeds import mix
from vqscale.training.checkpoints.keeper import Checkpoints
from vqscale.training.data_watch import Counted, DataWatch
from vqscale.training.engine import Engine, learning_rate
from vqscale.training.guards import require_finite
from vqscale.training.pieces import Piece
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch


class Task(ABC):
    """What differs between stages. Every method runs on every rank and may use collectives."""

    engine: Engine

    def before_step(self, batch: DeviceBatch) -> None:
        """Called before each step's forward."""

    @abstractmethod
    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Forward of a batch: scalars by name, `total` is what is minimised."""

    def after_step(self) -> None:
        """Called once after each successful optimizer step."""

    def figures(self) -> dict[str, float]:
        """Further figures of the last step, equal on all ranks."""
        return {}

    def pieces(self) -> list[Piece]:
        """What a checkpoint holds besides the engine's pieces and lies over the ranks as the weights do."""
        return []

    def extra_state(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds besides network and optimizers, by name; equal on all ranks."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `extra_state` gave; the same on every rank."""

    def check(self, step: int) -> None:
        """Compare ranks; raises when they differ."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Figures over the held-out data."""

    def pictures(self, step: int, tracker: Tracker) -> None:
        """Draw into TensorBoard; called on rank 0 alone, so no collective may be used."""


class Batches(Counted, Protocol):
    """The loader's batches on the device, as the loop sees them."""

    @property
    def wait_s(self) -> float:
        """Seconds that were spent waiting for batches."""

    def __iter__(self) -> Iterator[DeviceBatch]:
        """Endless batches from the loader's first step on."""


@dataclass
class _Window:
    """What is measured between two log lines."""

    began: float
    waited: float
    steps: int = 0


def train(
    task: Task,
    training: Training,
    loader: Batches,
    *,
    start: int,
    seed: int,
    checkpoints: Checkpoints,
    watch: DataWatch,
    tracker: Tracker | None,
) -> dict[str, float]:
    """Train from step `start` to the end; returns the last validation's figures.

    Args:
        task: model and losses.
        training: the stage's optimisation settings.
        loader: endless batches, the first one belongs to step `start`.
        start: finished steps.
        seed: the run's seed.
        checkpoints: saves the training; the last save has ended when this returns.
        watch: judges the data.
        tracker: on rank 0; None elsewhere.
    """
    engine, validation = task.engine, {}
    if start >= training.steps:  # everything but the stage's marker was written
        return _validate(task, start, None)
    window = _Window(time.perf_counter(), loader.wait_s)
    engine.model.train()
    for step, batch in zip(range(start, training.steps), loader, strict=False):
        # All of torch's randomness (dropout) is a function of seed, step and rank: resuming needs no generator state.
        torch.manual_seed(mix(seed, step, engine.ranks.rank))
        task.before_step(batch)
        losses = task.losses(batch)
        norm = engine.optimise(losses["total"], step)
        task.after_step()
        window.steps += 1

        done = step + 1
        last = done == training.steps
        if done % training.log_every == 0 or last or done == 1:
            _log(task, training, losses, norm, done, window, loader, watch, tracker)
            watch.check()
            window = _Window(time.perf_counter(), loader.wait_s)
        if done % training.hash_every == 0 or last:
            task.check(done)
        if done % training.validate_every == 0 or last:
            validation = _validate(task, done, tracker)
        if tracker and (done % training.picture_every == 0 or last or done == 1):
            task.pictures(done, tracker)
        if done % training.checkpoint_every == 0 or last:
            # Whatever was not logged: a checkpoint of weights that are not numbers would push out the good ones.
            require_finite(float(losses["total"].detach()), float(norm), done)
            checkpoints.save(task, done, tracker, final=last)
        checkpoints.poll(tracker)
    return validation


def _log(
    task: Task,
    training: Training,
    losses: dict[str, Tensor],
    norm: Tensor,
    done: int,
    window: _Window,
    loader: Batches,
    watch: DataWatch,
    tracker: Tracker | None,
) -> None:
    """Mean losses and bad samples over the ranks, and what the window measured; collective."""
    ranks = task.engine.ranks
    local = [*(value.detach().double() for value in losses.values())]
    counts = losses["total"].new_tensor(watch.counts(loader), dtype=torch.float64)
    sums = ranks.sum(torch.cat([torch.stack(local), counts])).tolist()
    watch.update(loader, sums[len(losses) :])
    means = {name: value / ranks.world for name, value in zip(losses, sums, strict=False)}
    require_finite(means["total"], float(norm), done)
    figures = task.figures()
    if tracker is None:
        return
    seconds = time.perf_counter() - window.began
    tracker.figures(
        done,
        {f"loss/{name}": value for name, value in means.items()}
        | figures
        | watch.figures()
        | {
            "optim/learning_rate": learning_rate(training, done - 1),
            "optim/gradient_norm": float(norm),
            "speed/data_wait": (loader.wait_s - window.waited) / seconds,
        },
        rate=window.steps * training.global_batch / seconds,
    )


def _validate(task: Task, done: int, tracker: Tracker | None) -> dict[str, float]:
    task.engine.model.eval()
    with torch.no_grad():
        figures = task.validate()
    task.engine.model.train()
    if tracker:
        tracker.scalars(done, {f"validation/{name}": value for name, value in figures.items()})
    return figures
