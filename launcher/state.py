"""How each stage of a run stands, as the supervisor saw it: `state.json`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

StageWord = Literal["waiting", "running", "done", "failed", "preempted", "cancelled"]
_STOPPED: tuple[StageWord, ...] = ("failed", "cancelled", "preempted")
ENDED = ("done", *_STOPPED)
"""Words of a run or stage that does not go on by itself."""


@dataclass(frozen=True)
class PastAttempt:
    """An attempt that another one has followed, and what became of it."""

    attempt: int
    state: StageWord
    """`running` where its supervisor was killed and could not write down the end."""
    started: float | None
    """Unix time."""
    ended: float | None
    """Unix time."""
    message: str


@dataclass
class StageState:
    """One stage: what happened to its newest attempt, and to those before."""

    state: StageWord = "waiting"
    attempt: int = 0
    """Number of the newest attempt; 0 when there was none."""
    started: float | None = None
    """Unix time."""
    ended: float | None = None
    """Unix time."""
    message: str = ""
    """Why it failed, in a line."""
    past: list[PastAttempt] = field(default_factory=list)
    """Earlier attempts, the oldest first."""

    @property
    def attempts(self) -> list[PastAttempt]:
        """All attempts so far, the newest last."""
        newest = PastAttempt(self.attempt, self.state, self.started, self.ended, self.message)
        return [*self.past, newest] if self.started else list(self.past)


@dataclass
class RunState:
    """All stages of a run, in order. Only the supervisor writes it, or a command when there is none."""

    stages: dict[str, StageState] = field(default_factory=dict)

    @classmethod
    def new(cls, stages: Iterable[str]) -> RunState:
        """A run that has not begun."""
        return cls({stage: StageState() for stage in stages})

    @classmethod
    def read(cls, layout: RunLayout) -> RunState:
        """The state of a run.

        Raises:
            UserError: there is no state, or it is not one of ours.
        """
        try:
            tree = read_json(layout.state)
            return cls({name: _stage(stage) for name, stage in tree["stages"].items()})
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError("holds no state of a run", where=str(layout.state)) from None

    def write(self, layout: RunLayout) -> None:
        """Write the state atomically."""
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        write_json(layout.state, {"updated": time.time(), "stages": stages})

    def begin(self, stage: str, attempt: int) -> None:
        """A stage's processes are about to start."""
        self.stages[stage] = StageState("running", attempt, started=time.time(), past=self.stages[stage].attempts)

    def end(self, stage: str, state: StageWord, message: str = "") -> None:
        """A stage's processes have ended."""
        entry = self.stages[stage]
        entry.state, entry.ended, entry.message = state, time.time(), message

    def stop(self, state: StageWord, message: str) -> None:
        """The run ends here: what runs, or else the next stage that waits, is marked with `state`."""
        unfinished = [name for name, stage in self.stages.items() if stage.state in ("running", "waiting")]
        unfinished.sort(key=lambda name: self.stages[name].state != "running")
        if unfinished and not any(stage.state in _STOPPED for stage in self.stages.values()):
            self.end(unfinished[0], state, message)

    def reopen(self, layout: RunLayout) -> None:
        """Ready to go on: every stage without its marker waits again."""
        for name, stage in self.stages.items():
            done = layout.done(name).exists()
            if done and stage.state != "done":
                stage.state, stage.message = "done", ""
            elif not done and stage.state != "waiting":
                self.stages[name] = StageState(attempt=stage.attempt, past=stage.attempts)

    @property
    def word(self) -> StageWord:
        """The run as a whole."""
        words = [stage.state for stage in self.stages.values()]
        stops: tuple[StageWord, ...] = (*_STOPPED, "running")
        for word in stops:
            if word in words:
                return word
        if all(word == "done" for word in words):
            return "done"
        return "waiting"

    @property
    def current(self) -> str | None:
        """The stage worth looking at: the one that runs or stopped the run, else the newest that began."""
        for word in ("running", *_STOPPED):
            for name, stage in self.stages.items():
                if stage.state == word and stage.attempt:
                    return name
        begun = [name for name, stage in self.stages.items() if stage.attempt]
        return begun[-1] if begun else None


def _stage(tree: dict[str, Any]) -> StageState:
    past = [PastAttempt(**attempt) for attempt in tree.get("past", [])]
    return StageState(**{**tree, "past": past})
