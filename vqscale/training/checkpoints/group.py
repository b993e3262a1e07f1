"""The ranks on a process group of their own, so that a save can go on in the background while training communicates."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from vqscale.errors import UserError
from vqscale.training.distributed import gloo_group

T = TypeVar("T")

PATIENCE = timedelta(hours=1)
"""Longest wait of a rank for the others, which may have more to write or a slower way to the storage."""


class Group:
    """All ranks over gloo, for small plain values only. What goes around are pickles, but between our own processes.

    Made once; the thread that writes and the loop never use it at the same time (`keeper`), so all ranks' collectives
    are in the same order.
    """

    def __init__(self) -> None:
        self.process_group = gloo_group(PATIENCE)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def each(self, call: Callable[[], T]) -> list[T]:
        """Call on every rank, and give all of them every rank's answer.

        Raises:
            UserError: one rank did; all raise the first one's.
        """
        answer: T | None = None
        fault: UserError | None = None
        try:
            answer = call()
        except UserError as error:
            fault = error
        answers = self.gather((answer, fault))
        for _, theirs in answers:
            if theirs is not None:
                raise theirs
        return [value for value, _ in answers]  # type: ignore[misc]

    def first_says(self, call: Callable[[], T]) -> T:
        """Call on rank 0 alone, and give all ranks its answer.

        Raises:
            UserError: it did.
        """
        return self.each(lambda: call() if self.first else None)[0]  # type: ignore[return-value]
