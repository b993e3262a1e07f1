"""The one training loop; the tokenizer and the prior are tasks in it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vqscale.config.recipe import Training
from vqscale.seeds import mix
from vqscale.training import checkpoint
from vqscale.training.checkpoint import Checkpoint
from vqscale.training.data_watch import Counted, DataWatch
from vqscale.training.engine import Engine
from vqscale.training.guards import require_finite, require_progress
from vqscale.training.optimizers import learning_rate
from vqscale.training.pieces import Piece, assemble
from vqscale.training.tracking import Tracker
from vqscale.training.transfer import DeviceBatch


class Task(ABC):
    """What differs between stages. Every method runs on every rank and may use collectives."""

    engine: Engine

    def before_step(self, batch: DeviceBatch) -> None:
        """Called before each step's forwards, with all of this rank's samples."""

    @abstractmethod
    def losses(self, batch: DeviceBatch) -> dict[str, Tensor]:
        """Forward of a micro-batch, of which a step may have several: scalars by name, `total` is minimised."""

    def after_step(self) -> None:
        """Called once after each successful optimizer step."""

    def figures(self) -> dict[str, float]:
        """Further figures of the last step, equal on all ranks."""
        return {}

    def pieces(self) -> list[Piece]:
        """What a checkpoint holds besides the engine's pieces and lies over the ranks as the weights do."""
        return []

    def extra_state(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds besides all pieces, by name; whole on every rank, rank 0's is saved."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `extra_state` gave; the same on every rank."""

    def check(self, step: int) -> None:
        """Compare ranks; raises when they differ."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Figures over the held-out data."""

    def pictures(self, step: int, tracker: Tracker | None) -> None:
        """Draw into TensorBoard. `tracker` is None on all ranks but 0: they take part in collectives alone."""


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


@dataclass
class _Progress:
    """What the steps since the start came to; the same decisions on all ranks."""

    losses: dict[str, Tensor]
    """Of the last step that was taken, a mean over this rank's micro-batches; empty before the first."""
    norm: float = 0.0
    """Its gradient norm."""
    skipped: int = 0
    """Steps that were not taken."""
    in_a_row: int = 0
    """Of these, the last ones."""


def resume(task: Task, folder: Path) -> tuple[int, list[str]]:
    """Load the newest valid checkpoint, chosen on rank 0; returns its step (0: none) and what was passed over."""
    engine = task.engine
    found, passed_over = checkpoint.newest(folder) if engine.ranks.first else (None, [])
    # Other ranks must not look for themselves: they could find another one.
    choice = engine.ranks.gather((str(found.path), found.step) if found else None)[0]
    if choice is None:
        return 0, passed_over
    chosen = Checkpoint(Path(choice[0]), choice[1])
    engine.materialise_optimizer()
    chosen.fill([*engine.pieces(), *task.pieces()])
    engine.loaded()
    task.load_extra_state(chosen.extra())
    return chosen.step, passed_over


def train(
    task: Task,
    training: Training,
    loader: Batches,
    *,
    start: int,
    seed: int,
    folder: Path,
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
        folder: where checkpoints go.
        watch: judges the data.
        tracker: on rank 0; None elsewhere.
    """
    engine, validation = task.engine, {}
    if start >= training.steps:  # everything but the stage's marker was written
        return _validate(task, start, None)
    window, progress, save_due = _Window(time.perf_counter(), loader.wait_s), _Progress({}), False
    engine.model.train()
    for step, batch in zip(range(start, training.steps), loader, strict=False):
        # All of torch's randomness (dropout) is a function of seed, step and rank: resuming needs no generator state.
        torch.manual_seed(mix(seed, step, engine.ranks.rank))
        _step(task, batch, progress)
        window.steps += 1
        done = step + 1
        last = done == training.steps
        # The last step has to be taken: what a skipped one leaves is not known to be good.
        require_progress(progress.in_a_row, 0 if last else training.max_skipped, done)
        save_due |= done % training.checkpoint_every == 0 or last
        if done % training.log_every == 0 or last or done == 1:
            _log(task, training, progress, done, window, loader, watch, tracker)
            watch.check()
            window = _Window(time.perf_counter(), loader.wait_s)
        if done % training.hash_every == 0 or last:
            task.check(done)
        if done % training.validate_every == 0 or last:
            validation = _validate(task, done, tracker)
        if done % training.picture_every == 0 or last or done == 1:
            task.pictures(done, tracker)
        if save_due and not progress.in_a_row:
            # Whatever was not logged: a checkpoint of weights that are not numbers would push out the good ones.
            require_finite(float(progress.losses["total"]), progress.norm, done)
            _save(task, folder, done, training.keep)
            save_due = False
    return validation


def _step(task: Task, batch: DeviceBatch, progress: _Progress) -> None:
    """Forward and backward of each micro-batch, then one optimizer step; the task goes on after a taken one alone."""
    engine, seen = task.engine, []
    task.before_step(batch)
    parts = batch.split(engine.training.micro_batch)
    for part in parts:
        with engine.accumulating(last=part is parts[-1]):
            losses = task.losses(part)
            engine.backward(losses["total"] / len(parts))
        seen.append({name: value.detach() for name, value in losses.items()})
    norm, taken = engine.optimise(batch.step)
    if not taken:
        progress.skipped += 1
        progress.in_a_row += 1
        return
    task.after_step()
    progress.losses = {name: torch.stack([each[name] for each in seen]).mean() for name in seen[0]}
    progress.norm, progress.in_a_row = norm, 0


def _log(
    task: Task,
    training: Training,
    progress: _Progress,
    done: int,
    window: _Window,
    loader: Batches,
    watch: DataWatch,
    tracker: Tracker | None,
) -> None:
    """Mean losses of the last taken step and bad samples over the ranks, and what the window measured; collective."""
    ranks, losses = task.engine.ranks, progress.losses
    counts = torch.tensor(watch.counts(loader), dtype=torch.float64, device=ranks.device)
    sums = ranks.sum(torch.stack([*(value.double() for value in losses.values()), *counts])).tolist()
    watch.update(loader, sums[len(losses) :])
    means = {name: value / ranks.world for name, value in zip(losses, sums, strict=False)}
    figures: dict[str, float] = {"optim/skipped": progress.skipped}
    if losses:
        require_finite(means["total"], progress.norm, done)
        figures |= task.figures() | {"optim/gradient_norm": progress.norm}
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
            "speed/data_wait": (loader.wait_s - window.waited) / seconds,
        },
        rate=window.steps * training.global_batch / seconds,
    )


def _validate(task: Task, done: int, tracker: Tracker | None) -> dict[str, float]:
    figures = task.validate()
    if tracker:
        tracker.scalars(done, {f"validation/{name}": value for name, value in figures.items()})
    return figures


def _save(task: Task, folder: Path, step: int, keep: int) -> None:
    ranks, pieces = task.engine.ranks, [*task.engine.pieces(), *task.pieces()]
    # Copies, since pieces may share memory; on the other ranks each tensor is freed before the next is made.
    tensors = {name: value.to("cpu", copy=True) for name, value in assemble(pieces, ranks) if ranks.first}
    if ranks.first:
        checkpoint.save(folder, step, tensors, keep, task.extra_state())
    ranks.barrier()
