"""What watches over a training loop, in one object: requests to stop, signs of life, pace, and faults on demand."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from vqscale.faults import NO_FAULTS, Faults
from vqscale.training.distributed import Ranks
from vqscale.training.pace import Pace
from vqscale.training.preemption import Notice, preemption
from vqscale.training.watchdog import Watchdog


class Vigil:
    """The loop calls it at four points of every step.

    Args:
        notice: requests to stop.
        watchdog: signs of life.
        pace: how long this rank's own part takes.
        faults: what is asked for.
        lead_s: seconds between a request to stop and the end, 0 where nobody said.
    """

    def __init__(
        self, notice: Notice, watchdog: Watchdog, pace: Pace, faults: Faults = NO_FAULTS, lead_s: float = 0.0
    ) -> None:
        self.notice, self.pace, self.faults, self.lead_s = notice, pace, faults, lead_s
        self._watchdog = watchdog
        self._warned = False

    def begin(self, step: int) -> bool:
        """A step begins; whether its loss is not to be a number, on demand."""
        self._watchdog.beat("own part", step)
        self.pace.begin()
        self.notice.begin()
        return "nan" in self.faults.at("step", step, asked=lambda: self.notice.received)

    def meet(self, step: int) -> None:
        """This rank's own part is done, and it is about to wait for the others."""
        self.faults.at("all-reduce", step)
        self.pace.meet()
        self._watchdog.beat("collective", step)

    def asked_to_stop(self) -> str:
        """The signal upon which all ranks stop behind this step; empty where there is none."""
        return self.notice.agreed()

    def doing(self, what: str, step: int) -> None:
        """A sign of life outside of a step's own part, such as `validation`."""
        self._watchdog.beat(what, step)

    def alive(self) -> None:
        """A sign of life in the midst of what was begun."""
        self._watchdog.alive()

    def too_slow(self, save_s: float) -> str:
        """A warning, once, when a save takes more than half of the time between a request to stop and the end."""
        if self._warned or not self.lead_s or 2 * save_s <= self.lead_s:
            return ""
        self._warned = True
        return (
            f"a save takes {save_s:.1f} s, more than half of the {self.lead_s:g} s between a request to stop and the "
            f"end; raise grace_s in the profile, or a preempted run may lose the steps since its last checkpoint"
        )


@contextmanager
def vigil(ranks: Ranks, watchdog: Watchdog, faults: Faults = NO_FAULTS, lead_s: float = 0.0) -> Iterator[Vigil]:
    """Watch over a stage's training until it ends; collective.

    Args:
        ranks: this process's place.
        watchdog: of this rank, not started yet.
        faults: what is asked for.
        lead_s: seconds between a request to stop and the end.
    """
    hosts = ranks.gather(socket.gethostname())
    with preemption() as notice, watchdog:
        yield Vigil(notice, watchdog, Pace(hosts), faults, lead_s)
