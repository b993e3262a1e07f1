"""One stage inside its Slurm job: `python -m launcher.batch --run RUN --stage STAGE ... -- srun ...`.

The batch script becomes this program on the first node. It runs `srun` as the supervisor runs torch's agent, with the
same words in `state.json`. USR2, which Slurm sends ahead of the end of the time or of a preemption, goes to `srun` and
from there to the processes on all nodes, which save. Then the job puts itself back into the queue: here, on the host,
since there is no `scontrol` inside containers. `requeue_refusal` says when it does not.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.rendezvous import Variable
from launcher.backends.base import ATTEMPT, StageCommand, task_variables
from launcher.handover import check_handover
from launcher.state import RunState
from launcher.supervise import Supervisor
from vqscale.config.layout import RunLayout
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.files import read_json, write_json


@dataclass(frozen=True)
class Batch:
    """A stage's job on its first node."""

    layout: RunLayout
    stage: str
    argv: tuple[str, ...]
    """`srun` with all its arguments."""
    job: str
    """The number that Slurm gave it; `ARRAY_TASK` where it is a task of an array."""
    requeues: int
    """How often it may put itself back into the queue."""
    grace_s: int
    """Seconds for the processes to stop by themselves."""

    def run(self) -> int:
        """Run the stage; 0 when it is done."""
        supervisor = Supervisor(self.layout, self._command, self.stage, self._was_cancelled)
        supervisor.run()
        entry = RunState.read(self.layout).stages[self.stage]
        # After TERM Slurm ends the job, and starts it again by itself if that was a preemption.
        if entry.state == "preempted" and supervisor.request.signal in (None, signal.SIGUSR2):
            self._requeue_or_fail(entry.message)
        return 0 if entry.state == "done" else 1

    def _command(self, layout: RunLayout, stage: str, attempt: int) -> StageCommand:
        check_handover(layout, stage)
        folder = layout.attempt(stage, attempt)
        # The variable is how torch's agent is told of `--log-dir`: the script cannot know the number of the attempt.
        variables = (
            Variable(ATTEMPT, str(attempt), "launcher.batch"),
            Variable("PET_LOG_DIR", str(folder / "ranks"), "launcher.batch"),
            *(task_variables(layout, stage, self._tasks) if layout.task is not None else ()),
        )
        # Everything is inherited: `sbatch` was given the allow-list, and what the script has set belongs to the stage.
        return StageCommand(
            stage, attempt, self.argv, variables, ("*",), Path.cwd(), folder / "agent.log", self.grace_s
        )

    @property
    def _tasks(self) -> int:
        return RunState.read(self.layout.whole).stages[self.stage].tasks

    def _was_cancelled(self) -> bool:
        return bool((read_json(self.layout.slurm) or {}).get("cancelled"))

    def _requeue_or_fail(self, message: str) -> None:
        failure = read_json(self.layout.failure(self.stage)) or {}
        if failure.get("kind") == "user":
            self._write("failed", str(failure["message"]))
            return
        step, earlier = self._step(), self._earlier()
        refusal = requeue_refusal(step, earlier, self.requeues)
        if refusal:
            self._write("preempted", f"{message}; not requeued: {refusal}")
            return
        write_json(self.layout.requeues(self.stage), {"job": self.job, "steps": [*earlier, step]})
        # Before the request: Slurm ends this process as soon as it has it.
        self._write("preempted", f"{message}; requeued ({len(earlier) + 1} of {self.requeues})")
        done = subprocess.run(["scontrol", "requeue", self.job], capture_output=True, text=True, check=False)
        if done.returncode:
            self._write("preempted", f"{message}; not requeued: {' '.join(done.stderr.split())}")

    def _step(self) -> int | None:
        """Step that the newest attempt has saved; None when it could not."""
        marker = read_json(self.layout.preempted(self.stage))
        mine = marker is not None and marker["attempt"] == RunState.read(self.layout).stages[self.stage].attempt
        return int(marker["step"]) if mine else None

    def _earlier(self) -> list[int | None]:
        """Steps at which this job was requeued before."""
        record = read_json(self.layout.requeues(self.stage)) or {}
        return list(record["steps"]) if record.get("job") == self.job else []

    def _write(self, word: str, message: str) -> None:
        state = RunState.read(self.layout)
        state.end(self.stage, "failed" if word == "failed" else "preempted", message)
        state.write(self.layout)
        print(f"{self.stage}: {message}", flush=True)


def requeue_refusal(step: int | None, earlier: Sequence[int | None], limit: int) -> str:
    """Why a preempted stage may not go back into the queue; empty when it may.

    Args:
        step: that it has saved; None when it could not.
        earlier: the same of the times that it was requeued before.
        limit: most times.
    """
    if len(earlier) >= limit:
        return f"the profile's limit of {limit} is reached"
    if earlier and (-1 if step is None else step) <= (-1 if earlier[-1] is None else earlier[-1]):
        return "no progress since the last time"
    return ""


def _of_job(layout: RunLayout, environment: Mapping[str, str]) -> tuple[RunLayout, str]:
    """The run, or the one task of it that this job is, and the number by which Slurm knows the job."""
    task, array = environment.get("SLURM_ARRAY_TASK_ID"), environment.get("SLURM_ARRAY_JOB_ID")
    if task is None or array is None:
        return layout, environment["SLURM_JOB_ID"]
    return layout.of_task(int(task)), f"{array}_{task}"


def main() -> int:
    """Entry of `python -m launcher.batch`."""
    parser = argparse.ArgumentParser(prog="python -m launcher.batch", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--requeues", type=int, required=True)
    parser.add_argument("--grace", type=int, required=True, metavar="SECONDS")
    # By hand: the command has a `--` of its own, which argparse may take away.
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, command = parser.parse_args(sys.argv[1:end]), tuple(sys.argv[end + 1 :])
    try:
        if not os.environ.get("SLURM_JOB_ID") or not command:
            raise UserError(
                "runs inside a job of Slurm", where=parser.prog, mend="vqscale submit --on PROFILE starts one"
            )
        layout, job = _of_job(RunLayout(given.run), os.environ)
        return Batch(layout, given.stage, command, job, given.requeues, given.grace).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
