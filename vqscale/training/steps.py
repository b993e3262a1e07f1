"""One optimizer step of a task: micro-batches, the gradient, and whether the step can be taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqscale.training.task import Task
from vqscale.training.transfer import DeviceBatch


class Steps:
    """Takes steps, and knows what the last one came to. All ranks come to the same decisions.

    Args:
        task: what is trained.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._engine = task, task.engine
        self.losses: dict[str, Tensor] = {}
        """Of the last step that was taken, a mean over this rank's micro-batches; empty before the first."""
        self.norm = 0.0
        """Its gradient norm."""
        self.skipped = 0
        """Steps whose gradient was not finite, so that they were not taken."""
        self.in_a_row = 0
        """Of these, the last ones."""

    def take(
        self,
        batch: DeviceBatch,
        *,
        meet: Callable[[], None] = lambda: None,
        spoil: bool = False,
    ) -> None:
        """Forward and backward of each micro-batch, then one optimizer step; the task goes on if it was taken.

        Args:
            batch: all of this rank's samples.
            meet: called before the ranks meet in the last backward.
            spoil: make the loss something that is not a number, as a fault on demand.
        """
        engine, seen = self._engine, []
        self._task.before_step(batch)
        parts = batch.split(engine.training.micro_batch)
        for part in parts:
            last = part is parts[-1]
            with engine.accumulating(last):
                losses = self._task.losses(part)
                if last:
                    meet()
                engine.backward(losses["total"] * (torch.nan if spoil else 1 / len(parts)))
            seen.append({name: value.detach() for name, value in losses.items()})
        norm, taken = engine.optimise(batch.step)
        if not taken:
            self.skipped += 1
            self.in_a_row += 1
            return
        self._task.after_step()
        self.losses = {name: torch.stack([each[name] for each in seen]).mean() for name in seen[0]}
        self.norm, self.in_a_row = norm, 0
