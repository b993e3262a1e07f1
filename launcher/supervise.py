"""The supervisor: a detached process on the host that runs the stages of one run, one after the other.

    python -m launcher.supervise RUN

TERM, INT and HUP cancel the run; USR2 announces a preemption: the stage saves, and `vqscale requeue` goes on from
there. Whatever happens, no process of a stage outlives the supervisor. The tasks of an array run one after the other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from launcher import again, process
from launcher.attempt import Attempts, Render, Request, say
from launcher.backends import backend_for
from launcher.backends.base import StageCommand
from launcher.handover import check_handover
from launcher.locks import held
from launcher.state import RunState, StageState, tasks_left
from launcher.state_words import StageWord
from vqscale.config.layout import RunLayout
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.files import write_json

_LEFTOVER_S = 5.0
"""For processes of an earlier supervisor; they may be in the middle of a save."""


class Supervisor:
    """Runs the unfinished stages of a run in order and keeps `state.json` true.

    Args:
        layout: the run; or one task of an array, with `only` its stage.
        render: makes the command of a stage.
        only: the one stage to run; None for all.
        cancelled: whether TERM, when it comes, means that somebody cancelled the run. Otherwise it is a preemption.
        persists: start a stage again that ended before its time, as far as the profile says so. In a queue the job
            does that.
    """

    def __init__(
        self,
        layout: RunLayout,
        render: Render,
        only: str | None = None,
        cancelled: Callable[[], bool] = lambda: True,
        persists: bool = False,
    ) -> None:
        self._layout, self._render, self._only = layout, render, only
        self._state = RunState.read(layout)
        if only:
            self._state.stages.setdefault(only, StageState())
        self.request = Request(cancelled)
        self._again = again.of_run(layout.root, self.request) if persists else None

    def run(self) -> str:
        """Run until all stages are done, one fails, or a signal asks to stop; returns the last state."""
        process.adopt_orphans()
        self.request.listen()
        stages = [self._only] if self._only else list(self._state.stages)
        self._clear_leftovers(stages[0])
        self._state.reopen(self._layout)
        self._state.write(self._layout)
        for stage in stages:
            if self._state.stages[stage].state != "done" and not self.request.came:
                self._run_stage(stage)
            if self._state.word in ("failed", "preempted"):
                break
        if self.request.came and any(self._state.stages[stage].state == "waiting" for stage in stages):
            word: StageWord = "preempted" if self.request.preempts else "cancelled"
            self._state.stop(word, "preempted before it began" if self.request.preempts else "cancelled")
        self._state.write(self._layout)
        say(f"run is {self._state.word}")
        return self._state.word

    def _run_stage(self, stage: str) -> None:
        tasks = self._state.stages[stage].tasks
        if tasks == 1:
            self._make(self._layout, self._state, stage)
            return
        for task in tasks_left(self._layout, stage, tasks):
            own = self._layout.of_task(task)
            if self._make(own, RunState.read(own), stage) != "done":
                break
        self._state = RunState.read(self._layout)

    def _make(self, layout: RunLayout, state: RunState, stage: str) -> str:
        """Attempts at a stage, or at one task of it, until one is done or nothing is to be gained by another."""
        attempts = Attempts(layout, state, self._render, self.request)
        word = attempts.make(stage).state
        while word in ("failed", "preempted") and self._again and self._again.wanted(layout, state, stage):
            word = attempts.make(stage).state
        return word

    def _clear_leftovers(self, stage: str) -> None:
        """Two attempts must never write the same files: end what a killed supervisor left running."""
        ended = Attempts(self._layout, self._state, self._render, self.request).sweep(stage, _LEFTOVER_S)
        if ended:
            say(f"ended {ended} process(es) of an earlier attempt")


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
    with _supervising(layout):
        write_json(layout.supervisor, process.identity(os.getpid()))
        return 0 if Supervisor(layout, render or _own_render, persists=True).run() == "done" else 1


def require_free(layout: RunLayout) -> None:
    """Whether nobody supervises a run; between machines as far as their file system has locks.

    Raises:
        UserError: somebody does.
    """
    with _supervising(layout):
        pass


def _own_render(layout: RunLayout, stage: str, attempt: int) -> StageCommand:
    check_handover(layout, stage)
    job = again.stage_job(layout, stage)
    return backend_for(job.profile).render(job, {stage: attempt})[0]


def _supervising(layout: RunLayout) -> AbstractContextManager[None]:
    return held(layout.root / "supervisor.lock", "another supervisor works on this run")


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
