"""Rounds in which contenders take turns, timed by wall clock and by CPU time of all processes involved."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil  # type: ignore[import-untyped]

WARM_UP_S = 2.0
"""Seconds for which each contender works before the first round."""

_STEP_S, _LONGEST_S, _QUIET = 0.02, 10.0, 0.1  # at rest: below a tenth of a core for a fiftieth of a second


def _nothing() -> None:
    """For contenders that need no preparation."""


@dataclass(frozen=True)
class Contender:
    """Someone who does the same work as the others.

    `work` does one lap and returns how much was done, such as the number of images; it returns when the work is
    done, so work on an accelerator is waited for. `before` and `after` are not timed.
    """

    name: str
    work: Callable[[], float]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Lap:
    """One contender's part of one round."""

    done: float
    """What `Contender.work` returned."""
    wall: float
    """Seconds by the clock."""
    cpu: float
    """CPU seconds of this process and all its children."""


@dataclass(frozen=True)
class Race:
    """The laps of all rounds."""

    laps: dict[str, list[Lap]] = field(default_factory=dict)
    """Contender → a lap a round, in order."""

    def rates(self, name: str) -> list[float]:
        """Done a second, by round."""
        return [lap.done / lap.wall for lap in self.laps[name]]

    def cpu_rates(self, name: str) -> list[float]:
        """Done a CPU second, by round."""
        return [lap.done / lap.cpu for lap in self.laps[name]]

    def seconds(self, name: str) -> list[float]:
        """Seconds, by round."""
        return [lap.wall for lap in self.laps[name]]


def cpu_seconds() -> float:
    """CPU seconds so far of this process and of its children, those that live and those that have ended."""
    ended = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    living = sum(_cpu_of(child.pid) for child in psutil.Process().children(recursive=True))
    return time.process_time() + ended + living


def _cpu_of(pid: int) -> float:
    """CPU seconds of a process, by its own clock in nanoseconds; /proc counts in hundredths of a second."""
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        return 0.0  # it has ended since it was listed
    try:
        return time.clock_gettime(clock.value)
    except OSError:
        return 0.0


def rest() -> None:
    """Wait until this process and its children are idle, so that nobody works on in another one's lap.

    Raises:
        RuntimeError: they do not come to rest.
    """
    began = before = time.perf_counter()
    used = _used_elsewhere()
    while before - began < _LONGEST_S:
        time.sleep(_STEP_S)
        now, later = time.perf_counter(), _used_elsewhere()
        if later - used < _QUIET * (now - before):
            return
        before, used = now, later
    raise RuntimeError(f"a contender still works {_LONGEST_S:.0f} s after its lap")


def _used_elsewhere() -> float:
    """CPU seconds but for this thread, which spends some on looking."""
    return cpu_seconds() - time.thread_time()


@dataclass(frozen=True)
class Clocks:
    """What a race reads; tests put made-up ones here."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = cpu_seconds
    rest: Callable[[], None] = rest


def race(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    warm_up_s: float = WARM_UP_S,
    clocks: Clocks | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Race:
    """Let contenders work in turns: first each warms up, then they go A B C, A B C, ...

    Args:
        contenders: who takes part.
        rounds: laps of each.
        warm_up_s: seconds for which each works at least before the first round.
        clocks: by default those of this machine.
        report: called with rounds done and rounds in all.
    """
    clocks = clocks or Clocks()
    laps: dict[str, list[Lap]] = {contender.name: [] for contender in contenders}
    report(0, rounds)
    for contender in contenders:
        _warm_up(contender, warm_up_s, clocks)
    for number in range(rounds):
        for contender in contenders:
            laps[contender.name].append(_lap(contender, clocks))
        report(number + 1, rounds)
    return Race(laps)


def _warm_up(contender: Contender, seconds: float, clocks: Clocks) -> None:
    worked = 0.0
    while worked < seconds:
        worked += _lap(contender, clocks).wall


def _lap(contender: Contender, clocks: Clocks) -> Lap:
    contender.before()
    try:
        cpu, wall = clocks.cpu(), clocks.wall()
        done = contender.work()
        wall, cpu = clocks.wall() - wall, clocks.cpu() - cpu
    finally:
        contender.after()
    clocks.rest()
    return Lap(done, wall, cpu)
