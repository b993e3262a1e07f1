"""The supervisor: a detached process on the host that runs the stages of one run, one after the other.

    python -m launcher.supervise RUN

A stage's outcome is its marker `done.json` or `preempted.json`, never an exit code: torch's agent exits with 1
after every signal it forwards, even when its processes finished. TERM, INT and HUP cancel the run; USR2 announces a
preemption: the stage saves, and `vqscale requeue` goes on from there. Whatever happens, no process of a stage outlives
the supervisor.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TextIO

from launcher import process
from launcher.backends.base import STAGE_TAG, StageCommand
from launcher.backends.local import LocalBackend
from launcher.job import job_of
from launcher.logs import last_words
from launcher.state import RunState, StageWord
from vqscale.config.layout import RunLayout
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.files import read_json, write_json

Render = Callable[[str, int], StageCommand]
"""From a stage's name and the number of the attempt to the command that runs it."""

_POLL_S = 0.1
_STRAGGLER_S = 1.0
"""For processes that are left when their agent has ended."""
_LEFTOVER_S = 5.0
"""For processes of an earlier supervisor; they may be in the middle of a save."""


class Supervisor:
    """Runs the unfinished stages of a run in order and keeps `state.json` true.

    Args:
        layout: the run.
        render: makes the command of a stage.
        only: the one stage to run; None for all.
        cancelled: whether TERM, when it comes, means that somebody cancelled the run. Otherwise it is a preemption.
    """

    def __init__(
        self,
        layout: RunLayout,
        render: Render,
        only: str | None = None,
        cancelled: Callable[[], bool] = lambda: True,
    ) -> None:
        self._layout, self._render, self._only, self._cancelled = layout, render, only, cancelled
        self._state = RunState.read(layout)
        self.signal: signal.Signals | None = None
        """The first request to stop; None when there was none."""

    def run(self) -> str:
        """Run until all stages are done, one fails, or a signal asks to stop; returns the last state."""
        process.adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, self._ask_to_stop)
        self._clear_leftovers()
        self._state.reopen(self._layout)
        self._save()
        stages = [self._only] if self._only else list(self._state.stages)
        for stage in stages:
            if self._state.stages[stage].state != "done" and not self._stopping:
                self._run_stage(stage)
            if self._state.word in ("failed", "preempted"):
                break
        if self._stopping and any(self._state.stages[stage].state == "waiting" for stage in stages):
            self._state.stop(*self._stop_words)
        self._save()
        _say(f"run is {self._state.word}")
        return self._state.word

    def _run_stage(self, stage: str) -> None:
        attempt = self._next_attempt(stage)
        self._layout.failure(stage).unlink(missing_ok=True)
        self._state.begin(stage, attempt)
        self._save()
        _say(f"{stage}: attempt {attempt} starts")
        try:
            exit_code = self._execute(self._render(stage, attempt))
        except (OSError, UserError) as error:
            self._state.end(stage, "failed", f"cannot start: {error}")
        else:
            self._judge(stage, exit_code)
        self._save()
        entry = self._state.stages[stage]
        _say(f"{stage}: {entry.state} {entry.message}".rstrip())

    def _execute(self, command: StageCommand) -> int:
        """Start the command, wait for its end or a request to stop, leave none of its processes behind."""
        command.log.parent.mkdir(parents=True, exist_ok=True)
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
        while agent.poll() is None and not self._stopping:
            time.sleep(_POLL_S)
        if agent.poll() is None:
            _say(f"{command.stage}: asked to stop; at most {command.grace_s} s until its processes are killed")
            _ask_agent(agent, self.signal, command.grace_s)
        self._sweep(_STRAGGLER_S)
        return agent.wait()

    def _judge(self, stage: str, exit_code: int) -> None:
        if self._layout.done(stage).exists():
            self._state.end(stage, "done")
        elif self._stopping and not self._preempting:
            self._state.end(stage, "cancelled", ", ".join(["cancelled", *self._saved(stage)]))
        elif self._preempting or self._saved(stage):
            saved = self._saved(stage) or ["not saved: it goes on from its last checkpoint"]
            self._state.end(stage, "preempted", f"preempted, {saved[0]}")
        else:
            self._state.end(stage, "failed", self._reason(stage, exit_code))

    def _saved(self, stage: str) -> list[str]:
        """What the stage says of its last save, if this attempt was asked to stop and could save."""
        marker = read_json(self._layout.preempted(stage))
        mine = marker is not None and marker["attempt"] == self._state.stages[stage].attempt
        return [f"saved at step {marker['step']}"] if mine else []

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
        return max([0, self._state.stages[stage].attempt, *numbers]) + 1

    def _clear_leftovers(self) -> None:
        """Two attempts must never write the same files: end what a killed supervisor left running."""
        ended = self._sweep(_LEFTOVER_S)
        if ended:
            _say(f"ended {ended} process(es) of an earlier attempt")

    def _sweep(self, grace_s: float) -> int:
        ended = process.end_tagged(STAGE_TAG, str(self._layout.root), grace_s)
        process.reap_orphans()
        return ended

    @property
    def _stopping(self) -> bool:
        return self.signal is not None

    @property
    def _preempting(self) -> bool:
        return self.signal == signal.SIGUSR2 or (self._stopping and not self._cancelled())

    @property
    def _stop_words(self) -> tuple[StageWord, str]:
        return ("preempted", "preempted before it began") if self._preempting else ("cancelled", "cancelled")

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)

    def _save(self) -> None:
        self._state.write(self._layout)


def supervise(root: Path, render: Render | None = None) -> int:
    """Run a run directory to its end.

    Args:
        root: run directory that `rundir.create` made.
        render: makes the command of a stage; None for the run's own backend.

    Returns:
        0 when all stages are done, 1 otherwise.

    Raises:
        UserError: no run, or another supervisor works on it.
    """
    layout = RunLayout(root.resolve())
    with (layout.root / "supervisor.lock").open("w") as lock:
        _hold(lock, layout)
        write_json(layout.supervisor, process.identity(os.getpid()))
        return 0 if Supervisor(layout, render or _own_render(layout)).run() == "done" else 1


def _own_render(layout: RunLayout) -> Render:
    def render(stage: str, attempt: int) -> StageCommand:
        return LocalBackend().render(job_of(layout, (stage,)), {stage: attempt})[0]

    return render


def _hold(lock: TextIO, layout: RunLayout) -> None:
    """The kernel lets go of the lock when its holder dies, however it dies."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError("another supervisor works on this run", where=str(layout.root)) from None


def _ask_agent(agent: subprocess.Popen[bytes], number: signal.Signals | None, grace_s: int) -> None:
    """A signal to the agent, which forwards it and kills its processes after the grace; then KILL."""
    agent.send_signal(signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM)
    try:
        agent.wait(grace_s + 2)
    except subprocess.TimeoutExpired:
        _say("the agent did not end in time and is killed")
        agent.kill()
        agent.wait()


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def main() -> int:
    """Entry of `python -m launcher.supervise`."""
    parser = argparse.ArgumentParser(prog="python -m launcher.supervise", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    try:
        return supervise(parser.parse_args().run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
