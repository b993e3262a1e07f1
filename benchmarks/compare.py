"""Two results, or two folders of them, side by side: what became slower?

Two things are compared. The ratios of a result, which are what is promised: flagged where the second is worse by more
than the tolerance, even if the intervals overlap, since a slowdown must not pass for noise. And the laps of each of
our contenders, by the clock and by CPU seconds, in units of what the others of the same round needed: so a change of
the machine's pace falls out, and contenders are covered that no ratio speaks of. Laps have more noise and no goal;
they are flagged where the interval of the change leaves no doubt as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.registry import is_ours
from benchmarks.result import Laps, Result, read_result
from vqscale.errors import UserError

TOLERANCE = 0.1
"""Changes below it are not spoken of. Half of 20 %, so that a slowdown of 20 % is as far from it as none."""
RESAMPLES = 2_000
"""Draws of the bootstrap."""
CLOCKS = {"wall": 1, "CPU": 2}
"""Clock → its place in a lap."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """What became of one value from the first result to the second; above 1 is better."""

    what: str
    better_by: float
    """Factor."""
    sure: bool
    """Whether noise as between these rounds is too small to explain it."""
    laps: bool = False
    """Whether it is from laps, not a ratio of the result."""
    before: str = ""
    after: str = ""

    def verdict(self, tolerance: float) -> str:
        """In a word, with a question mark where it may be noise; empty for changes within the tolerance."""
        if self.better_by < 1 / (1 + tolerance):
            return "SLOWER" if self.sure else "" if self.laps else "SLOWER?"
        return "faster" if self.better_by > 1 + tolerance and self.sure else ""


def pairs(one: Path, other: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Files to compare, by name where both are folders; and what only one of the folders has.

    Raises:
        UserError: a file and a folder, or nothing in common.
    """
    if one.is_dir() != other.is_dir():
        raise UserError(f"{one} and {other} are a folder and a file", where="--compare", mend="name two of a kind")
    if not one.is_dir():
        return [(one, other)], []
    names = [{path.name for path in folder.glob("*.json")} for folder in (one, other)]
    both = sorted(names[0] & names[1])
    if not both:
        raise UserError(
            f"{one} and {other} have no result of the same name", where="--compare", mend="measure the same"
        )
    return [(one / name, other / name) for name in both], sorted(names[0] ^ names[1])


def read_pair(one: Path, other: Path, force: bool) -> tuple[Result, Result]:
    """Both results.

    Raises:
        UserError: they are of different benchmarks or, unless forced, of different machines.
    """
    before, after = read_result(one), read_result(other)
    if before.name != after.name:
        raise UserError(f"{before.name} and {after.name} are different benchmarks", where="--compare")
    if before.machine.identity != after.machine.identity and not force:
        raise UserError(
            f"measured on different machines ({before.machine.name}, {after.machine.name})",
            where="--compare",
            mend="compare them all the same with --force",
        )
    return before, after


def changes(one: Result, other: Result) -> list[Change]:
    """Of ratios that both have, and of our contenders' laps."""
    return [*_of_ratios(one, other), *_of_laps(one, other)]


def _of_ratios(one: Result, other: Result) -> Iterator[Change]:
    for key in one.ratios:
        if key in other.ratios and one.ratios[key] > 0 and other.ratios[key] > 0:
            factor = other.ratios[key] / one.ratios[key]
            (low, high), (lower, higher) = one.intervals[key], other.intervals[key]
            yield Change(key, 1 / factor if smaller_is_better(one, key) else factor, high < lower or higher < low)


def smaller_is_better(result: Result, key: str) -> bool:
    """Whether a ratio should be small; its goal says so, or its name as a share of a step."""
    goal = result.goals.get(key)
    return goal.bound == "at most" if goal else key.endswith("_share_of_step")


def _of_laps(one: Result, other: Result) -> Iterator[Change]:
    for title in one.races:
        for name in one.races[title]:
            if is_ours(one.name, name) and name in other.races.get(title, {}):
                for clock, place in CLOCKS.items():
                    change = _lap_change(one.races[title], other.races[title], one.name, name, place)
                    if change:
                        yield Change(f"{title}: {name}, {clock} time", *change, laps=True)


def _lap_change(one: Laps, other: Laps, benchmark: str, name: str, clock: int) -> tuple[float, bool] | None:
    """Change of a contender's rate beside that of the others, and whether its 95 % interval leaves out 1.

    A ratio within a round for each of the others, its median over the rounds, how that has changed, and the middle of
    these changes: one peer in another version does not move it. None without others, or without this clock.
    """
    others = [who for who in one if who in other and not is_ours(benchmark, who)]
    before, after = (_beside(laps, name, others, clock) for laps in (one, other))
    both = [who for who in before if who in after]
    if not both:
        return None
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(laps[name]), (RESAMPLES, len(laps[name]))) for laps in (one, other)]

    def change(rounds: Sequence[NDArray[np.int64]]) -> Doubles:
        was, now = (
            np.stack([np.median(values[who][drawn], axis=-1) for who in both])
            for values, drawn in zip((before, after), rounds, strict=True)
        )
        return np.asarray(np.exp(np.median(now - was, axis=0)))

    low, high = np.percentile(change(draws), [2.5, 97.5])
    whole = [np.arange(len(laps[name])) for laps in (one, other)]
    return float(change(whole)), bool(high < 1 or low > 1)


def _beside(laps: Laps, name: str, others: Sequence[str], clock: int) -> dict[str, Doubles]:
    """Other contender → by round the logarithm of how much faster than it this one is; those with time on the clock."""
    own = _rates(laps[name], clock)
    rates = {who: _rates(laps[who], clock) for who in others}
    return {} if own is None else {who: own - rate for who, rate in rates.items() if rate is not None}


def _rates(laps: Sequence[tuple[float, float, float]], clock: int) -> Doubles | None:
    done, seconds = np.array([lap[0] for lap in laps]), np.array([lap[clock] for lap in laps])
    return np.asarray(np.log(done / seconds)) if (done > 0).all() and (seconds > 0).all() else None


def differences(one: Result, other: Result) -> list[str]:
    """What besides the code differs between two results."""
    found = []
    if one.machine.identity != other.machine.identity:
        found.append(f"the machines differ: {one.machine.name}, {other.machine.name}")
    for mine, its in ((one.config, other.config), (one.versions, other.versions)):
        found += [
            f"{key} differs: {mine.get(key)}, {its.get(key)}"
            for key in dict.fromkeys((*mine, *its))
            if mine.get(key) != its.get(key)
        ]
    for key in dict.fromkeys((*one.ratios, *other.ratios)):
        if key not in one.ratios or key not in other.ratios:
            found.append(f"only one of them has {key}")
    return found


def flagged(found: Mapping[str, Sequence[Change]], tolerance: float) -> list[str]:
    """Names of benchmarks and values that became slower."""
    return [
        f"{name}: {change.what}"
        for name, changed in found.items()
        for change in changed
        if change.verdict(tolerance).startswith("SLOWER")
    ]
