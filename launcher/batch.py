"""One stage inside its Slurm job: `python -m launcher.batch --run RUN --stage STAGE ... -- srun ...`.

The batch script becomes this program on the first node. It runs `srun` as the supervisor runs torch's agent, with the
same words in `state.json`. USR2, which Slurm sends ahead of the end of the time or of a preemption, goes to `srun` and
from there to the processes on all nodes, which save. What ends before its time puts itself back into the queue, if
`launcher.retry` says so: here, on the host, since there is no `scontrol` inside containers.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster.rendezvous import Variable
from launcher import retry
from launcher.backends import slurm_jobs
from launcher.backends import slurm_queue as queue
from launcher.backends.base import ATTEMPT, StageCommand, task_variables
from launcher.handover import check_handover
from launcher.retry import Failure, Judgement, Limits, Try
from launcher.state import RunState, StageState
from launcher.state_words import StageWord
from launcher.supervise import Supervisor
from vqscale.config.layout import RunLayout
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.files import read_json, write_json

Answer = TypeVar("Answer")

_RECORD_S = 60.0
"""How long a host may see a file as it was before another host replaced it: what NFS allows unless it is told."""
_RECORD_POLL_S = 1.0


@dataclass(frozen=True)
class Batch:
    """A stage's job on its first node."""

    layout: RunLayout
    stage: str
    argv: tuple[str, ...]
    """`srun` with all its arguments."""
    job: str
    """The number that Slurm gave it; `ARRAY_TASK` where it is a task of an array."""
    limits: Limits
    """How often it may put itself back into the queue."""
    grace_s: int
    """Seconds for the processes to stop by themselves."""

    def run(self) -> int:
        """Run the stage; 0 when it is done."""
        if not self._is_the_runs():
            return 1
        if self._was_lost_too_often():
            return 1
        supervisor = Supervisor(self.layout, self._command, self.stage, self._was_cancelled)
        supervisor.run()
        entry = self._entry()
        if entry.state in ("preempted", "failed"):
            judged = self._judged(entry)
            # After TERM Slurm ends the job, and starts it again by itself if that was a preemption or a lost node. It
            # may have come while Slurm was asked.
            if supervisor.request.signal in (None, signal.SIGUSR2):
                self._go_on_or_end(entry, *judged)
        return 0 if entry.state == "done" else 1

    def _is_the_runs(self) -> bool:
        """Two jobs must never run one stage: only that does which the run's record names."""
        own, limit = self.job.partition("_")[0], time.monotonic() + _RECORD_S
        while (known := slurm_jobs.jobs(self.layout).get(self.stage)) != own:
            if time.monotonic() > limit:
                what = f"job {own} does nothing: slurm.json names {known or 'none'} for this stage"
                print(f"{self.stage}: {what}; vqscale requeue {self.layout.root} submits it", flush=True)
                return False
            time.sleep(_RECORD_POLL_S)
        return True

    def _command(self, layout: RunLayout, stage: str, attempt: int) -> StageCommand:
        check_handover(layout, stage)
        folder = layout.attempt(stage, attempt)
        write_json(folder / "nodes.json", self._nodes())
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
        return bool(slurm_jobs.record(self.layout).get("cancelled"))

    def _judged(self, entry: StageState) -> tuple[Judgement, list[Try]]:
        earlier = retry.read_tries(self.layout, self.stage, self.job)
        down = self._down(self._nodes()) if entry.state == "failed" else []
        return retry.judge(self.layout, self.stage, entry, down, earlier, self.limits), earlier

    def _go_on_or_end(self, entry: StageState, judged: Judgement, earlier: list[Try]) -> None:
        """Back into the queue, without the nodes that are at fault; or the end, and why."""
        failure = judged.failure
        if failure.kind in retry.NEVER:
            self._write("failed", failure.message)
        elif judged.refusal:
            self._write(entry.state, f"{judged.words}; not requeued: {judged.refusal}")
        else:
            excluded = tuple(self._left_out(failure, earlier))
            this = Try(entry.attempt, failure.kind, judged.step, failure.message, excluded, judged.pause_s)
            self._requeue(judged, [*earlier, this])

    def _requeue(self, judged: Judgement, tries: list[Try]) -> None:
        last = tries[-1]
        retry.write_tries(self.layout, self.stage, self.job, tries)
        how = f"requeued ({len(tries)} of {self.limits.requeues}){last.words}"
        word: StageWord = "preempted" if judged.failure.kind == "preempted" else "waiting"
        # Before the request: Slurm ends this process soon after it has it.
        self._write(word, f"{judged.words}; {how}")
        try:
            queue.requeue(self.job)
            if last.pause_s or last.excluded:
                queue.put_off(self.job, last.pause_s, self._excluded(tries))
        except UserError as error:
            end: StageWord = "preempted" if word == "preempted" else "failed"
            self._write(end, f"{judged.words}; not requeued: {error.what}")

    def _left_out(self, failure: Failure, earlier: list[Try]) -> list[str]:
        nodes = self._nodes()
        ours = [node for node in failure.suspects if node in nodes]
        usable = [node for node, state in self._states().items() if not queue.is_out(state)] if ours else []
        return retry.left_out(ours, usable, self._excluded(earlier), len(nodes))

    def _excluded(self, tries: list[Try]) -> list[str]:
        """What Slurm is to leave out from now on: its list is replaced as a whole."""
        settings = read_json(self.layout.info)["profile"]["slurm"]
        return [*settings["exclude"], *dict.fromkeys(node for one in tries for node in one.excluded)]

    def _nodes(self) -> list[str]:
        """The nodes of this job; a stage does not fail because Slurm cannot be asked for them."""
        return self._asked(lambda: queue.hostnames(os.environ.get("SLURM_JOB_NODELIST", "")), [])

    def _states(self) -> dict[str, str]:
        """State of each node of the partition."""
        return self._asked(lambda: queue.node_states(os.environ.get("SLURM_JOB_PARTITION", "")), {})

    def _asked(self, question: Callable[[], Answer], otherwise: Answer) -> Answer:
        try:
            return question()
        except UserError as error:
            print(f"{self.stage}: {error}", flush=True)
            return otherwise

    def _down(self, nodes: list[str]) -> list[str]:
        """Those that do not answer; none is known where Slurm cannot be asked."""
        states = self._states() if nodes else {}
        return [node for node in nodes if queue.is_lost(states.get(node, ""))]

    def _was_lost_too_often(self) -> bool:
        """Slurm starts a job again by itself when a node is lost. The attempt before could not put that down."""
        entry, earlier = self._entry(), retry.read_tries(self.layout, self.stage, self.job)
        message = self._loss(entry) if not (earlier and earlier[-1].attempt == entry.attempt) else ""
        if not message:
            return False
        step = retry.progress(self.layout, self.stage)
        this = Try(entry.attempt, "node", step, f"{message}; started again by Slurm")
        retry.write_tries(self.layout, self.stage, self.job, [*earlier, this])
        print(f"{self.stage}: attempt {entry.attempt} was lost: {message}", flush=True)
        refusal = retry.refusal("node", step, earlier, self.limits)
        if refusal:
            self._write("failed", f"node: {message}; not started again: {refusal}")
        return bool(refusal)

    def _loss(self, entry: StageState) -> str:
        """What the attempt before this start was lost by; empty where it was not, or there was none."""
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" or not entry.attempt:
            return ""
        down = self._down(read_json(self.layout.attempt(self.stage, entry.attempt) / "nodes.json") or [])
        if down:
            return f"{', '.join(down)} does not answer"
        return "its host was lost" if entry.state == "running" else ""

    def _entry(self) -> StageState:
        return RunState.read(self.layout).stages.get(self.stage, StageState())

    def _write(self, word: StageWord, message: str) -> None:
        state = RunState.read(self.layout)
        state.end(self.stage, word, message)
        state.write(self.layout)
        print(f"{self.stage}: {message}", flush=True)


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
    parser.add_argument("--retries", type=int, required=True)
    parser.add_argument("--pause", type=int, required=True, metavar="SECONDS")
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
        limits = Limits(given.requeues, given.retries, given.pause)
        return Batch(layout, given.stage, command, job, limits, given.grace).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
