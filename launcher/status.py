"""What is known of a run, from all sources: its state, its markers, its events, and the backend.

Nothing is guessed: where the sources disagree, the status says so.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.profile import Profile
from launcher import process
from launcher.backends import backend_for
from launcher.backends.base import STAGE_TAG, Poll
from launcher.state import ENDED, RunState, StageState
from vqscale.config.layout import RunLayout
from vqscale.events import last_event
from vqscale.files import read_json
from vqscale.quarantine import count_by_kind


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
    bad: dict[str, int] = field(default_factory=dict)
    """Kind → bad samples on the stage's quarantine list."""


@dataclass(frozen=True)
class RunStatus:
    """A run as a whole and by stage."""

    id: str
    path: Path
    created: float
    profile: str
    state: str
    """waiting, running, done, failed, preempted or cancelled."""
    alive: bool | None
    """Whether somebody runs it; None when this machine cannot tell."""
    note: str
    """A disagreement between the sources, and what to do; empty when they agree."""
    stages: tuple[StageStatus, ...]

    @property
    def words(self) -> str:
        """State and note in a line."""
        return f"{self.state}, {self.note}" if self.note else self.state

    @property
    def message(self) -> str:
        """Why the run failed or was preempted; empty when it was not."""
        told = [stage for stage in self.stages if stage.state in ("failed", "preempted")]
        return next((f"{stage.stage}: {stage.message}" for stage in told), "")

    @property
    def over(self) -> bool:
        """Whether nothing more will happen by itself."""
        finished = self.state in ENDED
        return self.alive is False or (self.alive is None and finished)

    def facts(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {**asdict(self), "path": str(self.path)}


def read_status(layout: RunLayout) -> RunStatus:
    """The status of a run now.

    Raises:
        UserError: the directory holds no state.
    """
    info = read_json(layout.info)
    # The backend first: a run that ends in between has then written its last state before it is read.
    poll = backend_for(Profile.model_validate(info["profile"])).poll(layout)
    state = RunState.read(layout)
    return RunStatus(
        id=info["id"],
        path=layout.root,
        created=info["created"],
        profile=info["profile"]["name"],
        state=state.word,
        alive=poll.alive,
        note=_note(layout, info["id"], state, poll),
        stages=tuple(_stage(layout, name, stage) for name, stage in state.stages.items()),
    )


def _note(layout: RunLayout, run: str, state: RunState, poll: Poll) -> str:
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
        left = len(process.tagged(STAGE_TAG, str(layout.root)))
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


def _stage(layout: RunLayout, name: str, stage: StageState) -> StageStatus:
    seconds = (stage.ended or time.time()) - stage.started if stage.started else None
    state, message = stage.state, stage.message
    if state == "waiting" and layout.done(name).exists():
        state, message = "done", "started by hand"
    bad = count_by_kind(layout.quarantine(name))
    base = StageStatus(name, state, stage.attempt, seconds, message, bad=bad)
    event = last_event(layout.events(name))
    # An older attempt's line says nothing about this one.
    if event is None or (stage.attempt and event.get("attempt") != stage.attempt):
        return base
    return _with_event(base, event)


def _with_event(base: StageStatus, event: dict[str, Any]) -> StageStatus:
    figures = {key: event.get(key) for key in ("step", "total", "loss", "rate", "eta_s")}
    if base.state != "running":
        figures["eta_s"] = None
    elif figures["eta_s"] is not None:
        figures["eta_s"] = max(0.0, figures["eta_s"] - (time.time() - event["time"]))
    return StageStatus(**{**asdict(base), **figures, "unit": event.get("unit", "")})
