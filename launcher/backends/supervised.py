"""What backends share whose stages are supervised on the machine that submits: start, poll, cancel."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from launcher import process
from launcher.backends.base import SOURCE, STAGE_MODULES, STAGE_TAG, Job, Poll, StageCommand
from launcher.job import job_of
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

_THERE = "cancel it there; if that machine is gone for good, vqscale requeue --take-over first"


class Supervised:
    """Runs stages one after the other, each by a command of a detached supervisor on this machine.

    A backend of this kind says what the command of a stage is (`stage_command`), and what else has to be ended when a
    run is cancelled (`clear`).

    Args:
        modules: main of each stage; tests put their own here.
    """

    def __init__(self, modules: Mapping[str, str] = STAGE_MODULES) -> None:
        self._modules = modules

    def stage_command(self, job: Job, stage: str, attempt: int) -> StageCommand:
        """The command that the supervisor starts for a stage; a pure function."""
        raise NotImplementedError

    def check(self, job: Job) -> None:
        """Refuse, before anything is made, what cannot be started from here.

        Raises:
            UserError: what is missing.
        """

    def clear(self, layout: RunLayout) -> None:
        """End what the run may have left elsewhere than on this machine."""

    def agent(
        self, job: Job, stage: str, attempt: int, rendezvous: Sequence[str], python: str, tee: bool = False
    ) -> tuple[str, ...]:
        """Torch's elastic agent of a stage on one machine, with its logs in the folder of the attempt.

        Args:
            job: the job.
            stage: name of the stage.
            attempt: number of its attempt.
            rendezvous: `agent_arguments`.
            python: interpreter on that machine.
            tee: also write what the ranks say to the agent's own output.
        """
        logs = job.layout.attempt(stage, attempt) / "ranks"
        copies = ("--tee", "3") if tee else ()
        return (
            *(python, "-m", "torch.distributed.run", *rendezvous, "--log-dir", str(logs), "--redirects", "3", *copies),
            # `--`: without it the agent takes --run for a short form of its own --run-path.
            *("-m", "--", self._modules[stage], "--run", str(job.run)),
        )

    def render(self, job: Job, attempts: Mapping[str, int] | None = None) -> tuple[StageCommand, ...]:
        """Commands of the job's stages; a pure function."""
        numbers = attempts or {}
        return tuple(self.stage_command(job, stage, numbers.get(stage, 1)) for stage in job.stages)

    def submit(self, layout: RunLayout) -> Poll:
        """Start the supervisor in a session of its own, so that it outlives this terminal."""
        if self.poll(layout).alive:
            raise UserError("is running already", where=layout.root.name, mend="vqscale cancel ends it")
        self.check(job_of(layout, tuple(RunState.read(layout).stages)))
        with (layout.log).open("ab") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "launcher.supervise", str(layout.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=SOURCE,
                start_new_session=True,
            )
        # Written here and not by the supervisor alone: a `status` right behind `submit` must find it.
        write_json(layout.supervisor, process.identity(supervisor.pid))
        return self.poll(layout)

    def poll(self, layout: RunLayout) -> Poll:
        """Whether the supervisor lives; a recycled process id is not mistaken for it."""
        identity = read_json(layout.supervisor)
        if identity is None:
            return Poll(False, "never started", begun=False)
        where = f"supervisor {identity['pid']} on {identity['host']}"
        alive = process.is_alive(identity)
        words = {True: "alive", False: "gone", None: "cannot be asked from here"}[alive]
        return Poll(alive, f"{where}: {words}")

    def cancel(self, layout: RunLayout) -> None:
        """Stop supervisor and stage; also clears what a killed supervisor left behind."""
        identity = read_json(layout.supervisor)
        alive = process.is_alive(identity) if identity else False
        if alive is None:
            raise UserError(f"runs on {identity['host']}", where=layout.root.name, mend=_THERE)
        if identity and alive:
            process.terminate(identity)
            _wait_for_end(layout, identity)
        process.end_tagged(STAGE_TAG, str(layout.root), grace_s=5)
        self.clear(layout)
        state = RunState.read(layout)
        state.stop("cancelled", "cancelled")
        state.write(layout)


def rendezvous_id(job: Job, stage: str, attempt: int) -> str:
    """Name of the rendezvous of one attempt at a stage, or at one task of it."""
    return f"{job.run.name}-{stage}-{attempt}" + ("" if job.task is None else f"-{job.task}")


def _wait_for_end(layout: RunLayout, identity: Mapping[str, object]) -> None:
    """The supervisor ends on its own after the stage's grace; it is not killed, since it reaps the stage."""
    limit = time.monotonic() + _grace(layout) + 30
    while process.is_alive(identity):
        if time.monotonic() > limit:
            raise UserError(
                f"supervisor {identity['pid']} does not end",
                where=layout.root.name,
                mend=f"see {layout.root / 'supervisor.log'}",
            )
        time.sleep(0.05)


def _grace(layout: RunLayout) -> int:
    return int(read_json(layout.info)["profile"]["grace_s"])
