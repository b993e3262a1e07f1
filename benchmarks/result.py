"""What a benchmark writes: its figures, the ratios that count, and all that is needed to judge them.

The model is the schema (`vqscale bench --schema`). Unknown keys are refused, so that a result that was written by
another version is not half understood.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vqscale.errors import UserError
from vqscale.files import write_bytes

FORMAT: Literal["vqscale-bench/1"] = "vqscale-bench/1"

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Record):
    """A measured value over the rounds."""

    median: Number
    """Middle value."""
    p10: Number
    """Tenth percentile, linear between values."""
    p90: Number
    """Ninetieth percentile."""
    n: Annotated[int, Field(ge=1)]
    """Number of rounds."""
    unit: str
    """Unit of the three values."""


class Floor(Figure):
    """The best that is possible here, measured in the same rounds or derived from them."""

    formula: str
    """How it is got, in words."""


class Goal(_Record):
    """What a ratio should reach."""

    limit: Number
    """The bound."""
    bound: Literal["at least", "at most"]
    """On which side of it the goal is met."""

    def met(self, ratio: float) -> bool:
        """Whether a ratio reaches the goal."""
        return ratio >= self.limit if self.bound == "at least" else ratio <= self.limit


def at_least(limit: float) -> Goal:
    """A goal for a ratio that should be large."""
    return Goal(limit=limit, bound="at least")


def at_most(limit: float) -> Goal:
    """A goal for a ratio that should be small."""
    return Goal(limit=limit, bound="at most")


class Check(_Record):
    """A comparison that was made before anything was timed, and that held."""

    what: str
    """What was compared, in words."""
    value: Number
    """What was found."""
    limit: Number
    """The most that was allowed."""


class Machine(_Record):
    """Where it was measured."""

    name: str
    """Processor, cores and accelerators, fit for a file name."""
    cpu: str
    """Model of the processor."""
    cores: Annotated[int, Field(ge=1)]
    """Cores that the process may use."""
    flags: tuple[str, ...]
    """Instruction sets of the processor that matter for speed."""
    memory_gib: Number
    """Main memory."""
    gpus: tuple[str, ...]
    """Names of the accelerators that torch sees."""
    system: str
    """Kernel and architecture."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """What two results must share to be compared."""
        return self.cpu, self.cores, self.flags, round(self.memory_gib), self.gpus


class Commit(_Record):
    """Which code was measured."""

    id: str | None
    """Commit; None outside a git work tree."""
    dirty: bool
    """Whether the work tree held changes that are not in the commit."""


class Load(_Record):
    """What else the machine had to do."""

    before: tuple[Number, Number, Number]
    """Load averages over 1, 5 and 15 minutes at the beginning."""
    after: tuple[Number, Number, Number]
    """The same at the end; holds the benchmark's own load."""
    above_cores: bool
    """Whether the load of the last minute was above the number of cores, before or after."""
    others: Number
    """Cores that other processes kept busy meanwhile, on average."""


class Curve(_Record):
    """What a model says about sizes that were not measured."""

    what: str
    """In words."""
    x: str
    """What runs along it, with its unit."""
    y: str
    """What is said, with its unit."""
    points: tuple[tuple[Number, Number], ...]
    """(x, y), x ascending."""


class Compared(_Record):
    """A value of a model beside the measured one."""

    predicted: Number
    """By the model, from inputs that this value is not one of."""
    measured: Number
    """Median over the rounds."""
    unit: str
    """Unit of both."""

    @property
    def off(self) -> float:
        """By how much the model is above what was measured, as a share of it."""
        return self.predicted / self.measured - 1


class Prediction(_Record):
    """What a model makes of the measured values: no measurement, and marked as such wherever it is shown."""

    assumptions: tuple[str, ...]
    """What has to hold for it, in words."""
    inputs: dict[str, Number]
    """What it was computed from; the unit stands in the name."""
    curves: dict[str, Curve]
    """What it says."""
    compared: dict[str, Compared]
    """The same model's values where the same run measured too."""


Laps = dict[str, tuple[tuple[Number, Number, Number], ...]]
"""Contender → of each round what was done, the seconds and the CPU seconds."""


class Result(_Record):
    """One run of one benchmark."""

    format: Literal["vqscale-bench/1"] = FORMAT
    """Version of this format."""
    name: str
    """Name of the benchmark."""
    started: str
    """Time of the start, UTC."""
    seconds: Number
    """Duration, preparation and checks included."""
    machine: Machine
    """Where it was measured."""
    versions: dict[str, str]
    """Package → version."""
    config: dict[str, Any]
    """What was measured: sizes, data, rounds."""
    figures: dict[str, Figure]
    """Measured values by key."""
    floors: dict[str, Floor]
    """The best possible by key."""
    ratios: dict[str, Number]
    """By key the median over the rounds of the ratio within a round."""
    intervals: dict[str, tuple[Number, Number]]
    """Of each ratio the 95 % interval (bootstrap over the rounds)."""
    goals: dict[str, Goal]
    """Of ratios that have one, the goal."""
    skipped: dict[str, str]
    """What was left out, such as peers that are not installed → why."""
    correctness: dict[str, Check]
    """What was compared before anything was timed."""
    commit: Commit
    """Which code was measured."""
    load: Load
    """What else the machine had to do."""
    rounds: dict[str, tuple[Number, ...]]
    """Of each figure and floor the single values, in the order of the rounds."""
    races: dict[str, Laps] = {}
    """Title → the laps of all contenders, and of `pace`, the same fixed work in every race of every benchmark."""
    prediction: Prediction | None = None
    """What a model makes of it, for benchmarks that have one."""


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        UserError: there is no such file, or it is no result of this version.
    """
    try:
        return Result.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=str(path), mend="check the path") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(
            f"is no result of this version ({key or 'JSON'}: {fault['msg']})", where=str(path), mend="measure again"
        ) from None


def write_result(folder: Path, result: Result) -> Path:
    """Write a result as `FOLDER/NAME.json`; returns the path."""
    path = folder / f"{result.name}.json"
    write_bytes(path, (result.model_dump_json(indent=1) + "\n").encode())
    return path
