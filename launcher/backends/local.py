"""Backend `local`: every stage under torch's elastic agent on this machine, one after the other."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.rendezvous import agent_arguments
from launcher import process
from launcher.backends.base import STAGE_MODULES, STAGE_TAG, Job, Poll, StageCommand
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

SOURCE = Path(__file__).resolve().parents[2]
"""Folder of the packages; the supervisor and the stages start in it."""


class LocalBackend:
    """Runs stages on this machine, started by a detached supervisor process.

    Args:
        modules: main of each stage; tests put their own here.
    """

    def __init__(self, modules: Mapping[str, str] = STAGE_MODULES) -> None:
        self._modules = modules

    def render(self, job: Job, attempts: Mapping[str, int] | None = None) -> tuple[StageCommand, ...]:
        """Commands of the job's stages; a pure function."""
        numbers = attempts or {}
        return tuple(self._stage(job, stage, numbers.get(stage, 1)) for stage in job.stages)

    def _stage(self, job: Job, stage: str, attempt: int) -> StageCommand:
        logs = job.layout.attempt(stage, attempt)
        resources = job.resources(stage)
        agent = agent_arguments(
            rdzv_id=f"{job.run.name}-{stage}-{attempt}" + ("" if job.task is None else f"-{job.task}"),
            processes=resources.processes,
            max_restarts=resources.max_restarts,
        )
        return StageCommand(
            stage=stage,
            attempt=attempt,
            argv=(
                *(job.python, "-m", "torch.distributed.run", *agent),
                *("--log-dir", str(logs / "ranks"), "--redirects", "3"),
                # `--`: without it the agent takes --run for a short form of its own --run-path.
                *("-m", "--", self._modules[stage], "--run", str(job.run)),
            ),
            variables=job.variables(stage, attempt),
            inherit=job.profile.inherit,
            directory=job.source,
            log=logs / "agent.log",
            grace_s=job.profile.grace_s,
        )

    def submit(self, layout: RunLayout) -> Poll:
        """Start the supervisor in a session of its own, so that it outlives this terminal."""
        if self.poll(layout).alive:
            raise UserError("is running already", where=layout.root.name, mend="vqscale cancel ends it")
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
            raise UserError(f"runs on {identity['host']}", where=layout.root.name, mend="cancel it there")
        if identity and alive:
            process.terminate(identity)
            _wait_for_end(layout, identity)
        process.end_tagged(STAGE_TAG, str(layout.root), grace_s=5)
        state = RunState.read(layout)
        state.stop("cancelled", "cancelled")
        state.write(layout)


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
