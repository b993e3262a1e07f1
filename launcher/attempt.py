"""One attempt at a stage: its processes are started, watched, asked to stop, and swept away; then it is judged.

A stage's outcome is its marker `done.json` or `preempted.json`, never an exit code: torch's agent exits with 1
after every signal it forwards, even when its processes finished.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from launcher import process
from launcher.backends.base import STAGE_TAG, TASK_TAG, StageCommand
from launcher.logs import last_words
from launcher.state import RunState, StageState
from launcher.state_words import StageWord
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_bytes, write_json

Render = Callable[[RunLayout, str, int], StageCommand]
"""From a run (or one task of an array), a stage's name and the number of the attempt to the command that runs it.

It may refuse with a `UserError`: then the attempt has failed, and nothing was started."""

_NOTICES = (signal.SIGUSR2, signal.SIGUSR1)
"""They announce a preemption; which of them comes, the scheduler decides."""
_POLL_S = 0.1
_STRAGGLER_S = 1.0
"""For processes that are left when their agent has ended."""
_SEEN_S = 60.0
"""Longest wait for a file that another machine says it has written."""


@dataclass
class Request:
    """A request to stop, as signals bring it."""

    cancelled: Callable[[], bool]
    """Whether TERM, when it comes, means that somebody cancelled the run. Otherwise it is a preemption."""
    signal: signal.Signals | None = field(default=None, init=False)
    """The first one; None when there was none. USR1 counts as USR2."""

    def listen(self) -> None:
        """Take the signals of this process from now on."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *_NOTICES):
            signal.signal(number, self._receive)

    @property
    def came(self) -> bool:
        """Whether somebody asked."""
        return self.signal is not None

    @property
    def preempts(self) -> bool:
        """Whether the run is to go on elsewhere or later."""
        return self.signal == signal.SIGUSR2 or (self.came and not self.cancelled())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        notice = number in _NOTICES
        self.signal = self.signal or (signal.SIGUSR2 if notice else signal.Signals(number))


class Attempts:
    """Attempts at the stages of a run, or of one task of an array.

    Args:
        layout: whose state and logs are written.
        state: how its stages stand; kept true, and written.
        render: makes the command of a stage.
        request: asks to stop.
    """

    def __init__(self, layout: RunLayout, state: RunState, render: Render, request: Request) -> None:
        self._layout, self._state, self._render, self._request = layout, state, render, request

    def make(self, stage: str) -> StageState:
        """Make the next attempt at a stage, and wait for its end; returns how it stands then."""
        state, attempt = self._state, self._next_attempt(stage)
        for left in (self._layout.failure(stage), self._layout.lost(stage)):
            left.unlink(missing_ok=True)
        state.begin(stage, attempt)
        state.write(self._layout)
        say(f"{self._name(stage)}: attempt {attempt} starts")
        try:
            exit_code = self._execute(self._render(self._layout, stage, attempt))
        except (OSError, UserError) as error:
            message = f"cannot start: {error}"
            kind = "user" if isinstance(error, UserError) else "error"
            write_json(self._layout.failure(stage), {"stage": stage, "kind": kind, "rank": -1, "message": message})
            state.end(stage, "failed", message)
        else:
            state.end(stage, *self._judged(stage, exit_code))
        state.write(self._layout)
        entry = state.stages[stage]
        say(f"{self._name(stage)}: {entry.state} {entry.message}".rstrip())
        return entry

    def sweep(self, stage: str, grace_s: float) -> int:
        """End all processes of the run, or of the one task; returns how many there were."""
        task = self._layout.task is not None
        tag = (TASK_TAG, str(self._layout.stage(stage))) if task else (STAGE_TAG, str(self._layout.root))
        ended = process.end_tagged(*tag, grace_s)
        process.reap_orphans()
        return ended

    def _execute(self, command: StageCommand) -> int:
        """Start the command, wait for its end or a request to stop, leave none of its processes behind."""
        command.log.parent.mkdir(parents=True, exist_ok=True)
        if command.script:
            write_bytes(Path(command.argv[-1]), command.script.encode())
        with command.log.open("ab") as log:
            agent = subprocess.Popen(
                command.argv,
                env=command.environment(),
                cwd=command.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(process.die_with, os.getpid()),
            )
        while agent.poll() is None and not self._request.came:
            time.sleep(_POLL_S)
        if agent.poll() is None:
            say(f"{command.stage}: asked to stop; at most {command.grace_s} s until its processes are killed")
            _ask_agent(agent, self._request.signal, command.grace_s)
        self.sweep(command.stage, _STRAGGLER_S)
        return agent.wait()

    def _judged(self, stage: str, exit_code: int) -> tuple[StageWord, str]:
        """How the attempt ended, and why."""
        if self._is_done(stage, exit_code):
            return "done", ""
        saved = self._saved(stage)
        if self._request.came and not self._request.preempts:
            return "cancelled", ", ".join(filter(None, ["cancelled", saved]))
        if self._request.preempts or saved:
            return "preempted", f"preempted, {saved or 'not saved: it goes on from its last checkpoint'}"
        return "failed", self._reason(stage, exit_code)

    def _is_done(self, stage: str, exit_code: int) -> bool:
        """Whether the marker is there. Where the agent's end says so, it is waited for: another machine wrote it."""
        marker = self._layout.done(stage)
        limit = time.monotonic() + (_SEEN_S if exit_code == 0 else 0)
        while not marker.exists():
            if time.monotonic() > limit:
                return False
            os.listdir(marker.parent)  # NFS may remember that a name was missing, and asks anew for a listing
            time.sleep(_POLL_S)
        return True

    def _saved(self, stage: str) -> str:
        """What the stage says of its last save, if this attempt was asked to stop and could save."""
        marker = read_json(self._layout.preempted(stage))
        mine = marker is not None and marker["attempt"] == self._state.stages[stage].attempt
        return f"saved at step {marker['step']}" if mine else ""

    def _reason(self, stage: str, exit_code: int) -> str:
        failure = read_json(self._layout.failure(stage))
        if failure and failure.get("message"):
            return str(failure["message"])
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with code {exit_code}"
        words = last_words(self._layout.attempt(stage, self._state.stages[stage].attempt))
        return f"its processes left no marker and their agent {how}" + (f": {words}" if words else "")

    def _next_attempt(self, stage: str) -> int:
        """Numbers are never used twice, even if the state was lost: logs are not overwritten."""
        folders = self._layout.stage(stage).glob("attempt-[0-9]*")
        numbers = [int(path.name.partition("-")[2]) for path in folders]
        known = self._state.stages[stage].attempt if stage in self._state.stages else 0
        return max([0, known, *numbers]) + 1

    def _name(self, stage: str) -> str:
        return stage if self._layout.task is None else f"{stage} task {self._layout.task}"


def _ask_agent(agent: subprocess.Popen[bytes], number: signal.Signals | None, grace_s: int) -> None:
    """A signal to the agent, which forwards it and kills its processes after the grace; then KILL."""
    agent.send_signal(signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM)
    try:
        agent.wait(grace_s + 2)
    except subprocess.TimeoutExpired:
        say("the agent did not end in time and is killed")
        agent.kill()
        agent.wait()


def say(text: str) -> None:
    """A line in the supervisor's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)
