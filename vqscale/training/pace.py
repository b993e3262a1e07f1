"""Which rank is slow: each measures its own part of a step, from the batch until it begins to wait for others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SLOW = 1.5  # times the median rank's own part, from which on a rank is worth a warning
_WINDOWS = 2  # in a row: one slow window may be a validation's aftermath


@dataclass(frozen=True)
class Slowest:
    """The rank with the longest own part of a window's steps."""

    rank: int
    own_s: float
    """Seconds a step."""
    over_median: float
    """The same as a multiple of the median rank's (of the lower median, so that one of two ranks can be slow)."""


class Pace:
    """Seconds of one rank's own part since the last window.

    Under a strategy that communicates in the forward (fsdp2, zero3), waiting for others is part of it, and differences
    between ranks are smaller than the truth. On a GPU it is the time until the kernels are queued, plus the waiting for
    data, which is where ranks differ most.

    Args:
        hosts: host name of each rank.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._own = 0.0
        self._began = 0.0
        self._in_a_row = (-1, 0)

    def begin(self) -> None:
        """This rank begins a step."""
        self._began = time.perf_counter()

    def meet(self) -> None:
        """It is about to wait for the others."""
        self._own += time.perf_counter() - self._began

    def own(self, rank: int, waited_for_data: float) -> list[float]:
        """Seconds of this window by rank, this rank's alone, to be summed over ranks; begins the next window."""
        mine, self._own = self._own + waited_for_data, 0.0
        return [mine if place == rank else 0.0 for place in range(len(self._hosts))]

    def judge(self, own: Sequence[float], steps: int) -> tuple[Mapping[str, float], str]:
        """Figures of a window, and a warning when the same rank has been slow for some windows, else nothing."""
        if len(own) < 2 or steps < 2:  # the first step of an attempt starts everything up
            return {}, ""
        slowest = _slowest([seconds / steps for seconds in own])
        before, times = self._in_a_row
        slow = slowest.over_median >= _SLOW
        self._in_a_row = (slowest.rank, times + 1 if before == slowest.rank else 1) if slow else (-1, 0)
        figures = {"speed/slowest_rank": float(slowest.rank), "speed/slowest_over_median": slowest.over_median}
        if self._in_a_row[1] != _WINDOWS:
            return figures, ""
        return figures, (
            f"rank {slowest.rank} on {self._hosts[slowest.rank]} takes {slowest.own_s:.3g} s for its own part of a "
            f"step, {slowest.over_median:.1f} times the median rank; the others wait for it"
        )


def _slowest(own: Sequence[float]) -> Slowest:
    rank = max(range(len(own)), key=own.__getitem__)
    median = sorted(own)[(len(own) - 1) // 2]
    return Slowest(rank, own[rank], own[rank] / max(median, 1e-9))
