"""The real supervisor over fake stages: `python -m tests.fake_stages.supervisor RUN STAGE=ACT ...`.

A task of an array is `STAGE.TASK`. The act `ranks` starts `tests.fake_stages.ranked` under torch's elastic agent.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.backends.base import STAGE_TAG, StageCommand, Variable, task_variables
from launcher.backends.local import LocalBackend
from launcher.job import job_of
from launcher.supervise import supervise
from vqscale.config.layout import RunLayout

ROOT = Path(__file__).resolve().parents[2]


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
        if acts.get(stage) == "ranks":
            backend = LocalBackend({stage: "tests.fake_stages.ranked"})
            return backend.render(job_of(layout, (stage,)), {stage: attempt})[0]
        name = stage if layout.task is None else f"{stage}.{layout.task}"
        return fake_command(layout, stage, attempt, acts.get(name, "done"))

    return supervise(run, render)


if __name__ == "__main__":
    sys.exit(main())
