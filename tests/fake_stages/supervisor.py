"""The real supervisor over fake stages: `python -m tests.fake_stages.supervisor RUN STAGE=ACT ...`.

A task of an array is `STAGE.TASK`. The act `ranks` starts `tests.fake_stages.ranked` under torch's elastic agent,
the act `hosts` `tests.fake_stages.hosted` on each host of the run's profile, the acts `pods:...`
`tests.fake_stages.podded` in each of its pods.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.again import stage_job
from launcher.backends import backend_for
from launcher.backends.base import STAGE_TAG, Job, StageCommand, Variable, task_variables
from launcher.backends.kubernetes import KubernetesBackend
from launcher.backends.ssh import SshBackend
from launcher.supervise import supervise
from vqscale.config.layout import RunLayout

ROOT = Path(__file__).resolve().parents[2]


class Hosted(SshBackend):
    """Without torch, which takes its time."""

    def agent(
        self, job: Job, stage: str, attempt: int, rendezvous: Sequence[str], python: str, tee: bool = False
    ) -> tuple[str, ...]:
        return (python, "-m", "tests.fake_stages.hosted", str(job.run), stage)


class Podded(KubernetesBackend):
    """The same for pods."""

    def __init__(self, act: str) -> None:
        super().__init__()
        self._act = act

    def agent(
        self, job: Job, stage: str, attempt: int, rendezvous: Sequence[str], python: str, tee: bool = False
    ) -> tuple[str, ...]:
        return (python, "-m", "tests.fake_stages.podded", str(job.run), stage, self._act)


def real_command(layout: RunLayout, stage: str, attempt: int, act: str) -> StageCommand:
    job = stage_job(layout, stage)
    if act == "hosts":
        return Hosted().stage_command(job, stage, attempt)
    if act.startswith("pods:"):
        return Podded(act.partition(":")[2]).stage_command(job, stage, attempt)
    backend = type(backend_for(job.profile))({stage: "tests.fake_stages.ranked"})
    return backend.render(job, {stage: attempt})[0]


def fake_command(layout: RunLayout, stage: str, attempt: int, act: str) -> StageCommand:
    run = str(layout.root)
    play = (sys.executable, "-m", "tests.fake_stages.play", "--run", run, "--stage", stage, "--act", act)
    variables = (Variable(STAGE_TAG, run, "test"), Variable("VQSCALE_ATTEMPT", str(attempt), "test"))
    if layout.task is not None:
        variables += task_variables(layout, stage, 3)
    log = layout.attempt(stage, attempt) / "agent.log"
    return StageCommand(stage, attempt, play, variables, ("PATH", "PYTHONPATH"), ROOT, log, grace_s=1)


def main() -> int:
    run = Path(sys.argv[1])
    acts = dict(text.split("=") for text in sys.argv[2:])

    def render(layout: RunLayout, stage: str, attempt: int) -> StageCommand:
        act = acts.get(stage if layout.task is None else f"{stage}.{layout.task}", "done")
        make = real_command if act in ("ranks", "hosts") or act.startswith("pods:") else fake_command
        return make(layout, stage, attempt, act)

    return supervise(run, render)


if __name__ == "__main__":
    sys.exit(main())
