"""How each stage of a run stands, as the supervisor saw it: `state.json`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from launcher.state_words import STOPPED, StageWord
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json


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
    tasks: int = 1
    """Tasks that share the stage's work. Each has a state of its own; this one is then made of them."""

    @property
    def attempts(self) -> list[PastAttempt]:
        """All attempts so far, the newest last."""
        newest = PastAttempt(self.attempt, self.state, self.started, self.ended, self.message)
        return [*self.past, newest] if self.started else list(self.past)


@dataclass
class RunState:
    """All stages of a run, in order. Only the supervisor writes it, or a command when there is none.

    A task of an array has a file of its own, since several of them run at the same time.
    """

    stages: dict[str, StageState] = field(default_factory=dict)

    @classmethod
    def new(cls, stages: Iterable[str], tasks: Mapping[str, int] | None = None) -> RunState:
        """A run that has not begun; `tasks` says of arrays how many tasks they have."""
        return cls({stage: StageState(tasks=(tasks or {}).get(stage, 1)) for stage in stages})

    @classmethod
    def read(cls, layout: RunLayout) -> RunState:
        """The state of a run, or of one task.

        Raises:
            UserError: there is no state, or it is not one of ours.
        """
        tree = read_json(layout.state)
        if tree is None and layout.task is not None:
            return cls()  # it has not begun
        try:
            stages = {name: _stage(stage) for name, stage in tree["stages"].items()}
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError("holds no state of a run", where=str(layout.state)) from None
        return cls({name: _merged(layout, name, stage) for name, stage in stages.items()})

    def write(self, layout: RunLayout) -> None:
        """Write the state atomically."""
        stages = {name: asdict(stage) for name, stage in self.stages.items()}
        write_json(layout.state, {"updated": time.time(), "stages": stages})

    def begin(self, stage: str, attempt: int) -> None:
        """A stage's processes are about to start."""
        before = self.stages.get(stage, StageState())
        self.stages[stage] = StageState(
            "running", attempt, started=time.time(), past=before.attempts, tasks=before.tasks
        )

    def end(self, stage: str, state: StageWord, message: str = "") -> None:
        """A stage's processes have ended."""
        entry = self.stages[stage]
        entry.state, entry.ended, entry.message = state, time.time(), message

    def stop(self, state: StageWord, message: str) -> None:
        """The run ends here: what runs, or else the next stage that waits, is marked with `state`."""
        unfinished = [name for name, stage in self.stages.items() if stage.state in ("running", "waiting")]
        unfinished.sort(key=lambda name: self.stages[name].state != "running")
        if unfinished and not any(stage.state in STOPPED for stage in self.stages.values()):
            self.end(unfinished[0], state, message)

    def reopen(self, layout: RunLayout) -> None:
        """Ready to go on: every stage without its marker waits again, and so do its tasks."""
        for name, stage in self.stages.items():
            if stage.tasks > 1:
                _reopen_tasks(layout, name, stage.tasks)
            done = layout.done(name).exists()
            if done and stage.state != "done":
                stage.state, stage.message = "done", ""
            elif not done and stage.state != "waiting":
                self.stages[name] = StageState(attempt=stage.attempt, past=stage.attempts, tasks=stage.tasks)

    @property
    def word(self) -> StageWord:
        """The run as a whole."""
        words = [stage.state for stage in self.stages.values()]
        stops: tuple[StageWord, ...] = (*STOPPED, "running")
        for word in stops:
            if word in words:
                return word
        if all(word == "done" for word in words):
            return "done"
        return "waiting"

    @property
    def current(self) -> str | None:
        """The stage worth looking at: the one that runs or stopped the run, else the newest that began."""
        for word in ("running", *STOPPED):
            for name, stage in self.stages.items():
                if stage.state == word and stage.attempt:
                    return name
        begun = [name for name, stage in self.stages.items() if stage.attempt]
        return begun[-1] if begun else None


def _stage(tree: dict[str, Any]) -> StageState:
    past = [PastAttempt(**attempt) for attempt in tree.get("past", [])]
    return StageState(**{**tree, "past": past})


def tasks_left(layout: RunLayout, stage: str, tasks: int) -> list[int]:
    """Tasks of an array without their marker. All have it while the stage has not: then one is to finish the stage."""
    left = [task for task in range(tasks) if not layout.of_task(task).done(stage).exists()]
    return left or ([] if layout.done(stage).exists() else [tasks - 1])


def _reopen_tasks(layout: RunLayout, stage: str, tasks: int) -> None:
    for task in tasks_left(layout, stage, tasks):
        own = layout.of_task(task)
        own.done(stage).unlink(missing_ok=True)
        (own.parts(stage) / f"{task:03d}.json").unlink(missing_ok=True)
        if own.state.exists():
            state = RunState.read(own)
            state.reopen(own)
            state.write(own)


def _merged(layout: RunLayout, name: str, entry: StageState) -> StageState:
    """What the states of all tasks come to; the stage's own entry where it is no array, or none of them has begun."""
    if entry.tasks == 1:
        return entry
    states = [RunState.read(layout.of_task(task)).stages.get(name, StageState()) for task in range(entry.tasks)]
    words = [state.state for state in states]
    if set(words) == {"waiting"}:
        return entry
    word = _word_of(words, entry)
    begun = [state for state in states if state.attempt]
    told = next((f"; task {n}: {one.message}" for n, one in enumerate(states) if one.state in STOPPED), "")
    return replace(
        entry,
        state=word,
        attempt=max(state.attempt for state in begun),
        started=min(state.started or time.time() for state in begun),
        ended=None if word == "running" else max(state.ended or 0.0 for state in begun),
        message=f"{words.count('done')} of {entry.tasks} tasks done{told}",
    )


def _word_of(words: list[StageWord], entry: StageState) -> StageWord:
    """The word for an array of which some tasks have begun."""
    if "running" not in words:
        for stopped in STOPPED:
            if stopped in words or ("waiting" in words and entry.state == stopped):
                return stopped
    return "done" if set(words) == {"done"} else "running"
