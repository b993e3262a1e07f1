"""What is known of a run, from all sources: its state, its markers, its events, and the backend.

Nothing is guessed: where the sources disagree, the status says so.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster.profile import Profile
from launcher import process
from launcher.backends import backend_for
from launcher.backends.base import STAGE_TAG, Poll
from launcher.state import RunState, StageState
from launcher.state_words import ENDED, UNREADABLE
from launcher.sweep import turn
from vqscale.checkpoint import folder
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.events import newest
from vqscale.files import read_json
from vqscale.quarantine import count_by_kind

_READERS = 16
"""Threads that read run directories: on a shared file system each small file is a wait of its own."""
_ALONE_S = 0.3
"""How long one thread looks at runs by itself: where storage answers at once, threads only wait for each other."""


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint of a stage."""

    step: int
    time: float
    """Unix time at which it was committed."""

    @property
    def age_s(self) -> float:
        """Seconds since then."""
        return max(0.0, time.time() - self.time)


@dataclass(frozen=True)
class StageStatus:
    """One stage and the newest line of its events."""

    stage: str
    state: str
    attempt: int
    seconds: float | None
    """Seconds that the newest attempt has taken."""
    message: str
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    rate: float | None = None
    unit: str = ""
    eta_s: float | None = None
    tasks: int = 1
    """Tasks of an array; step, total and rate are then sums over them."""
    bad: dict[str, int] = field(default_factory=dict)
    """Kind → bad samples on the stage's quarantine list."""
    saved: Saved | None = None
    """Its newest checkpoint, by the run's own folder; by the stage's events where checkpoints lie elsewhere."""


@dataclass(frozen=True)
class RunStatus:
    """A run as a whole and by stage."""

    id: str
    path: Path
    created: float
    profile: str
    state: str
    """waiting, running, done, failed, preempted or cancelled; unreadable where nothing else is known."""
    alive: bool | None
    """Whether somebody runs it; None when this machine cannot tell."""
    note: str
    """A disagreement between the sources, and what to do; empty when they agree."""
    stages: tuple[StageStatus, ...]
    current: str | None
    """Name of the stage worth looking at; None when none has begun."""
    queued: bool = False
    """Whether it waits for its turn in a sweep that is on its way."""

    @property
    def stage(self) -> StageStatus | None:
        """The stage worth looking at; None when none has begun."""
        return next((stage for stage in self.stages if stage.stage == self.current), None)

    @property
    def words(self) -> str:
        """State and note in a line."""
        return f"{self.state}, {self.note}" if self.note else self.state

    @property
    def message(self) -> str:
        """Why the run failed, was preempted, or waits to be tried again; empty when it is none of these."""
        told = [stage for stage in self.stages if stage.state in ("failed", "preempted", "waiting") and stage.message]
        return next((f"{stage.stage}: {stage.message}" for stage in told), "")

    @property
    def over(self) -> bool:
        """Whether nothing more will happen by itself."""
        finished = self.state in (*ENDED, UNREADABLE)
        return self.alive is False or (self.alive is None and finished)

    def facts(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {**asdict(self), "path": str(self.path)}


class Machine:
    """What is asked of this machine once, however many runs are looked at; asked when it is first needed."""

    @functools.cached_property
    def processes(self) -> Counter[str]:
        """Run directory → processes of its stages on this machine."""
        return process.tags(STAGE_TAG)


def unreadable(run: str, path: Path, created: float, fault: UserError) -> RunStatus:
    """What stands in a list for a run that cannot be read."""
    return RunStatus(run, path, created, "", UNREADABLE, alive=None, note=str(fault), stages=(), current=None)


Depth = Literal["all", "current", "none"]
"""Of which stages events, checkpoints and bad samples are read: all, the one worth looking at, none."""


def read_status(layout: RunLayout, machine: Machine | None = None, depth: Depth = "all") -> RunStatus:
    """The status of a run now.

    Args:
        layout: the run.
        machine: shared by runs that are looked at together.
        depth: how much is read of the stages.

    Raises:
        UserError: the directory holds no run, or no state.
    """
    try:
        info = read_json(layout.info)
        profile = Profile.model_validate(info["profile"])
        run, created = str(info["id"]), float(info["created"])
    except (KeyError, TypeError, ValueError):
        raise UserError("holds no run", where=str(layout.root)) from None
    # The backend first: a run that ends in between has then written its last state before it is read.
    poll = backend_for(profile).poll(layout)
    state = RunState.read(layout)
    current = state.current
    deep = state.stages.keys() if depth == "all" else {current} if depth == "current" else set()
    stages = (_stage(layout, name, stage, name in deep) for name, stage in state.stages.items())
    waits = turn(layout) if state.word == "waiting" and poll.alive is False else ""
    return RunStatus(
        id=run,
        path=layout.root,
        created=created,
        profile=profile.name,
        state=state.word,
        alive=poll.alive,
        note=waits or _note(layout, run, state, poll, machine or Machine()),
        stages=tuple(stages),
        current=current,
        queued=bool(waits),
    )


def read_many(layouts: Iterable[RunLayout], depth: Depth = "current") -> list[RunStatus | UserError]:
    """The status of many runs in their order; in its place the error, where a directory holds none."""
    machine = Machine()

    def read(layout: RunLayout) -> RunStatus | UserError:
        try:
            return read_status(layout, machine, depth)
        except UserError as error:
            return error
        except OSError as error:  # somebody else's, or storage that is gone
            return UserError(f"cannot be read ({error.strerror})", where=str(layout.root))

    left, found = list(layouts), list[RunStatus | UserError]()
    limit = time.monotonic() + _ALONE_S
    while left and time.monotonic() < limit:
        found.append(read(left.pop(0)))
    with ThreadPoolExecutor(_READERS) as readers:
        return [*found, *readers.map(read, left)]


def _note(layout: RunLayout, run: str, state: RunState, poll: Poll, machine: Machine) -> str:
    lost = [name for name, stage in state.stages.items() if stage.state == "done" and not layout.done(name).exists()]
    if lost:
        return f"but stage {lost[0]} has lost its marker done.json: vqscale requeue {run}"
    if poll.alive is None:
        return f"as its state file says; {poll.words}"
    if poll.alive:
        return poll.note
    if state.word == "preempted":
        return f"vqscale requeue {run} goes on"
    if state.word == "running":
        left = machine.processes[str(layout.root)]
        still = f" ({left} of its processes still run: vqscale cancel {run})" if left else ""
        return f"but its {poll.who} is gone: vqscale requeue {run}{still}"
    if state.word == "waiting":
        return _never_began(layout, run, state, poll)
    return ""


def _never_began(layout: RunLayout, run: str, state: RunState, poll: Poll) -> str:
    if any(stage.attempt for stage in state.stages.values()):
        return f"but its {poll.who} is gone: vqscale requeue {run}"
    if not poll.begun:
        return f"prepared only: vqscale requeue {run} starts it"
    return f"but its {poll.who} is gone before the first stage: see {layout.log}"


def _stage(layout: RunLayout, name: str, stage: StageState, deep: bool) -> StageStatus:
    seconds = (stage.ended or time.time()) - stage.started if stage.started else None
    state, message = stage.state, stage.message
    if state == "waiting" and layout.done(name).exists():
        state, message = "done", "started by hand"
    base = StageStatus(name, state, stage.attempt, seconds, message, tasks=stage.tasks)
    if not deep:
        return base
    bad = count_by_kind(layout.quarantine(name))
    found = _of_tasks(layout, base) if stage.tasks > 1 else _of_events(layout, base)
    return replace(base, bad=bad, **found)


def _of_events(layout: RunLayout, base: StageStatus) -> dict[str, Any]:
    found = newest(layout.events(base.stage), "", "checkpoint")
    facts: dict[str, Any] = {"saved": _saved(layout, base.stage, found.get("checkpoint"))}
    event = found.get("")
    # An older attempt's line says nothing about this one.
    if event is not None and (not base.attempt or event.get("attempt") == base.attempt):
        facts |= _progress(base, event)
    return facts


def _of_tasks(layout: RunLayout, base: StageStatus) -> dict[str, Any]:
    """Figures of an array: sums over its tasks. What they come to in the end is known when all have begun."""
    owns = [layout.of_task(task) for task in range(base.tasks)]
    entries = [RunState.read(own).stages.get(base.stage, StageState()) for own in owns]
    single = [_stage(own, base.stage, entry, deep=True) for own, entry in zip(owns, entries, strict=True)]
    told = [task for task in single if task.step is not None]
    running = [task for task in told if task.state == "running"]
    whole = len(told) == base.tasks and all(task.total is not None for task in told)
    left = [task.eta_s for task in running if task.eta_s is not None]
    return {
        "step": sum(task.step or 0 for task in told) if told else None,
        "total": sum(task.total or 0 for task in told) if whole else None,
        "rate": sum(task.rate or 0.0 for task in running) or None,
        "unit": told[0].unit if told else "",
        "eta_s": max(left) if whole and running and len(left) == len(running) else None,
    }


def _progress(base: StageStatus, event: dict[str, Any]) -> dict[str, Any]:
    figures = {key: event.get(key) for key in ("step", "total", "loss", "rate", "eta_s")}
    if base.state != "running":
        figures["eta_s"] = None
    elif figures["eta_s"] is not None:
        figures["eta_s"] = max(0.0, figures["eta_s"] - (time.time() - event["time"]))
    return {**figures, "unit": event.get("unit", "")}


def _saved(layout: RunLayout, stage: str, event: dict[str, Any] | None) -> Saved | None:
    """The folder of the run is looked at; of checkpoints elsewhere, perhaps behind a slow URL, the events tell."""
    here = layout.root / "checkpoints" / stage
    found = folder.steps(here)
    if found:
        with contextlib.suppress(FileNotFoundError):  # removed since
            return Saved(found[0], Path(folder.step_url(here, found[0])).stat().st_mtime)
    return Saved(event["step"], event["time"]) if event else None
