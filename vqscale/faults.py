"""Faults on demand, for tests and drills: `VQSCALE_FAULT` says what happens to which rank, when, and where.

    VQSCALE_FAULT="kill:step=37,rank=1,point=during-save"
    VQSCALE_FAULT="nan:step=5; slow:step=9,rank=0,seconds=3"

A fault happens once, whatever number of attempts a stage takes: it is written to the stage's `faults.jsonl` before it
happens, and what stands there does not happen again.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from vqscale.errors import UserError

VARIABLE = "VQSCALE_FAULT"
"""The environment variable that asks for faults."""

ACTIONS = {
    "kill": "SIGKILL to itself",
    "stop": "SIGSTOP to itself: the process hangs, deaf to everything but SIGKILL",
    "exception": "an exception in the program",
    "nan": "the loss is not a number",
    "enospc": "the disk is full",
    "slow": "a sleep of `seconds`",
    "hold": "a wait until the process is asked to stop, or `file` is there",
    "truncate-shard": "the next shard that is opened ends in its middle",
}
"""Action → what it does."""

POINTS = {
    "step": "before the step's forward",
    "all-reduce": "before the step's all-reduce, in which the other ranks wait",
    "loader": "when a shard is opened; `step` counts this rank's openings in the attempt, from 0",
    "before-save": "before anything of a checkpoint is written",
    "during-save": "between a checkpoint's data and its manifest",
    "after-save": "after a checkpoint was committed",
}
"""Point → where it lies. At the three of a save, `step` counts finished steps."""

_ONLY_AT = {"nan": "step", "hold": "step", "truncate-shard": "loader", "enospc": "during-save"}
_LEFT_TO_THE_CALLER = {"nan", "truncate-shard"}
_LOOK_S = 0.02
_EXAMPLE = "kill:step=37,rank=1,point=during-save"


class InjectedError(RuntimeError):
    """The exception that was asked for."""


@dataclass(frozen=True)
class Fault:
    """One fault: what, and when."""

    action: str
    step: int
    """Step (from 0) or other count at which it happens; see `POINTS`."""
    rank: int = 0
    point: str = "step"
    stage: str = ""
    """Stage that it happens to; empty for every one."""
    times: int = 1
    """How often it happens before it is spent; each time in an attempt of its own."""
    seconds: float = 1.0
    """Length of `slow`."""
    file: str = ""
    """Path that ends `hold`."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """`ACTION:key=value,...`; without a point, it is the one that the action has, or `step`.

        Raises:
            UserError: unknown words, values that are no numbers, or an action at a point where it cannot happen.
        """
        action, _, rest = text.strip().partition(":")
        _known("action", action, ACTIONS)
        given = dict(part.strip().partition("=")[::2] for part in rest.split(",") if part.strip())
        known = {field.name: field.type for field in fields(cls) if field.name != "action"}
        for name in given:
            _known("setting", name, known)
        if "step" not in given:
            raise UserError(f"'{text.strip()}' has no step", where=VARIABLE, mend=f"such as {_EXAMPLE}")
        point = given.setdefault("point", _ONLY_AT.get(action, "step"))
        _known("point", point, POINTS)
        if _ONLY_AT.get(action, point) != point:
            raise UserError(f"{action} happens at point {_ONLY_AT[action]} only", where=VARIABLE, mend="leave it out")
        return cls(action, **{name: _convert(name, value, known[name]) for name, value in given.items()})

    def __str__(self) -> str:
        default = {field.name: field.default for field in fields(self)}
        named = {name: getattr(self, name) for name in default if name != "action"}
        return f"{self.action}:" + ",".join(
            f"{name}={value}" for name, value in named.items() if value != default[name]
        )


class Faults:
    """The faults of one rank in one stage.

    Args:
        faults: of all ranks and stages.
        stage: name of the stage.
        rank: this rank.
        record: the stage's list of what has happened (`RunLayout.faults`); None keeps none.
    """

    def __init__(
        self, faults: Iterable[Fault] = (), stage: str = "", rank: int = 0, record: Path | None = None
    ) -> None:
        self._record, spent = record, _happened(record)
        self._mine = [
            fault
            for fault in faults
            if fault.rank == rank and fault.stage in ("", stage) and spent.count(str(fault)) < fault.times
        ]

    @classmethod
    def from_environment(cls, stage: str, rank: int, record: Path) -> Self:
        """What `VQSCALE_FAULT` asks for.

        Raises:
            UserError: it cannot be understood.
        """
        asked = parse_faults(os.environ.get(VARIABLE, ""))
        return cls(asked, stage, rank, record if asked else None)

    def __bool__(self) -> bool:
        return bool(self._mine)

    def at(self, point: str, step: int, asked: Callable[[], object] = lambda: False) -> set[str]:
        """Let happen what is due here.

        Args:
            point: one of `POINTS`.
            step: what is counted there.
            asked: whether the process was asked to stop, which ends `hold`.

        Returns:
            Actions that are the caller's to carry out: `nan`, `truncate-shard`.

        Raises:
            InjectedError: `exception` is due.
            OSError: `enospc` is due.
        """
        due = [fault for fault in self._mine if (fault.point, fault.step) == (point, step)]
        for fault in due:
            self._mine.remove(fault)
            self._note(fault)
            _happen(fault, asked)
        return {fault.action for fault in due} & _LEFT_TO_THE_CALLER

    def _note(self, fault: Fault) -> None:
        """First the record: a fault that kills must not wait for the next attempt."""
        print(f"fault on demand: {fault}", flush=True)
        if self._record is None:
            return
        self._record.parent.mkdir(parents=True, exist_ok=True)
        with self._record.open("ab") as file:
            file.write((json.dumps({"fault": str(fault), "rank": fault.rank, "time": time.time()}) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Faults that are separated by semicolons.

    Raises:
        UserError: one of them cannot be understood.
    """
    return tuple(Fault.parse(part) for part in text.split(";") if part.strip())


def _happen(fault: Fault, asked: Callable[[], object]) -> None:
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.action == "slow":
        time.sleep(fault.seconds)
    elif fault.action == "hold":
        while not asked() and not (fault.file and os.path.exists(fault.file)):
            time.sleep(_LOOK_S)
    elif fault.action == "exception":
        raise InjectedError(f"fault on demand: {fault}")
    elif fault.action == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (fault on demand: {fault})")


def _happened(record: Path | None) -> list[str]:
    if record is None or not record.exists():
        return []
    return [json.loads(line)["fault"] for line in record.read_text(encoding="utf-8").splitlines()]


def _known(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise UserError(f"unknown {what} '{name}'", where=VARIABLE, mend=f"{what}s: {', '.join(names)}")


def _convert(name: str, value: str, kind: Any) -> Any:
    try:
        return {"int": int, "float": float, "str": str}[kind](value)
    except ValueError:
        raise UserError(f"{name}={value} is not a number", where=VARIABLE, mend=f"such as {_EXAMPLE}") from None


NO_FAULTS = Faults()
"""Nothing happens."""
