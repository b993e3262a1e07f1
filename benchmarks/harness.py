"""What a benchmark is given: it races contenders, keeps figures, ratios and checks, and ends as a `Result`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine, stats, timing
from benchmarks.result import Check, Figure, Floor, Goal, Laps, Prediction, Result
from benchmarks.timing import Clocks, Contender, Race

ROUNDS, QUICK_ROUNDS = 7, 2
PACE = "pace"
"""Name of the contender that is in every race: fixed work of the standard library on one thread. Where all others are
ours, it is what their laps are measured by when two results are compared."""


class WrongResultError(Exception):
    """A contender computes something else than the others, so that their times cannot be compared."""


@dataclass(frozen=True)
class Options:
    """What the command line asks of a benchmark."""

    quick: bool = False
    """Few rounds of small work: shows that it runs; its figures say nothing."""
    data: Path | None = None
    """Data to measure with, where a benchmark takes any."""
    rounds: int | None = None
    """Rounds of each race; None for what the harness thinks enough."""
    profile: str | None = None
    """Name or path of the profile whose machines a benchmark speaks about."""


Report = Callable[[str, int, int], None]
"""Called with a title, steps done and steps in all."""


def _silent(title: str, done: int, total: int) -> None:
    """No report."""


@dataclass
class Bench:
    """Collects what one benchmark finds.

    Args:
        name: of the benchmark.
        folder: an empty folder for its files, removed afterwards.
        options: what the command line asks.
        goals: goals of the ratios.
        packages: whose versions belong to the result.
        report: shows progress.
        clocks: what races read.
    """

    name: str
    folder: Path
    options: Options = Options()
    goals: Mapping[str, Goal] = field(default_factory=dict)
    packages: Sequence[str] = ()
    report: Report = _silent
    clocks: Clocks = field(default_factory=Clocks)
    config: dict[str, Any] = field(default_factory=dict)
    """Sizes and choices that the result has to name."""

    def __post_init__(self) -> None:
        self._figures: dict[str, Figure] = {}
        self._floors: dict[str, Floor] = {}
        self._rounds: dict[str, tuple[float, ...]] = {}
        self._ratios: dict[str, float] = {}
        self._intervals: dict[str, tuple[float, float]] = {}
        self._skipped: dict[str, str] = {}
        self._checks: dict[str, Check] = {}
        self._races: dict[str, Laps] = {}
        self._prediction: Prediction | None = None
        self._started = datetime.now(UTC)
        self._load = machine.LoadWatch()

    @property
    def quick(self) -> bool:
        """Whether small work will do."""
        return self.options.quick

    def race(self, title: str, contenders: Sequence[Contender]) -> Race:
        """Race contenders; with `--quick` in few rounds and without warming up."""
        # Made-up clocks are not moved by it.
        beside = [pace(self.quick)] if self.clocks == Clocks() else []
        found = timing.race(
            [*contenders, *beside],
            self.options.rounds or (QUICK_ROUNDS if self.quick else ROUNDS),
            warm_up_s=0.0 if self.quick else timing.WARM_UP_S,
            clocks=self.clocks,
            report=lambda done, total: self.report(title, done, total),
        )
        self._races[title] = {
            name: tuple((lap.done, lap.wall, lap.cpu) for lap in laps) for name, laps in found.laps.items()
        }
        return Race({contender.name: found.laps[contender.name] for contender in contenders})

    def figure(self, key: str, values: Sequence[float], unit: str) -> None:
        """Keep a figure, from its values by round."""
        self._figures[key] = stats.figure(values, unit)
        self._rounds[key] = tuple(values)

    def floor(self, key: str, values: Sequence[float], unit: str, formula: str) -> None:
        """Keep a floor: what would be the best, and how it is got, in words."""
        spread = stats.figure(values, unit)
        self._floors[key] = Floor(**spread.model_dump(), formula=formula)
        self._rounds[key] = tuple(values)

    def ratio(self, key: str, over: Sequence[float], under: Sequence[float]) -> None:
        """Keep a ratio of values of the same rounds, with its interval."""
        self._ratios[key], self._intervals[key] = stats.ratio(over, under)

    def check(self, key: str, what: str, value: float, at_most: float) -> None:
        """Keep a comparison; call it before the contenders are timed.

        Raises:
            WrongResultError: the value is above the limit.
        """
        if not value <= at_most or math.isinf(value):
            raise WrongResultError(f"{self.name}: {key}: {what}: {value:.6g}, at most {at_most:.6g} is allowed")
        self._checks[key] = Check(what=what, value=value, limit=at_most)

    def skip(self, name: str, why: str) -> None:
        """Say that something is left out."""
        self._skipped[name] = why

    def predict(self, prediction: Prediction) -> None:
        """Keep what a model makes of the figures."""
        self._prediction = prediction

    def finish(self) -> Result:
        """What was found, with all that is needed to judge it."""
        load = self._load.finish()
        return Result(
            name=self.name,
            started=self._started.isoformat(timespec="seconds"),
            seconds=round((datetime.now(UTC) - self._started).total_seconds(), 1),
            machine=machine.machine(),
            versions=machine.versions(self.packages),
            config={"quick": self.quick, **self.config},
            figures=self._figures,
            floors=self._floors,
            ratios=self._ratios,
            intervals=self._intervals,
            goals={key: goal for key, goal in self.goals.items() if key in self._ratios},
            skipped=self._skipped,
            correctness=self._checks,
            commit=machine.commit(),
            load=load,
            rounds=self._rounds,
            races=self._races,
            prediction=self._prediction,
        )


def pace(quick: bool) -> Contender:
    """Hashes some megabytes, the same in every race; bytes."""
    data = bytes((2 if quick else 32) << 20)

    def work() -> float:
        hashlib.blake2b(data).digest()
        return len(data)

    return Contender(PACE, work)
