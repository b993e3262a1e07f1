"""The real supervisor over fake stages: `python -m tests.fake_stages.supervisor RUN STAGE=ACT ...`.

The act `ranks` starts `tests.fake_stages.ranked` under torch's elastic agent.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.backends.base import STAGE_TAG, StageCommand, Variable
from launcher.backends.local import LocalBackend
from launcher.job import job_of
from launcher.supervise import supervise
from vqscale.config.layout import RunLayout

ROOT = Path(__file__).resolve().parents[2]


def fake_command(run: Path, stage: str, attempt: int, act: str) -> StageCommand:
    play = (sys.executable, "-m", "tests.fake_stages.play", "--run", str(run), "--stage", stage, "--act", act)
    variables = (Variable(STAGE_TAG, str(run), "test"), Variable("VQSCALE_ATTEMPT", str(attempt), "test"))
    log = RunLayout(run).attempt(stage, attempt) / "agent.log"
    return StageCommand(stage, attempt, play, variables, ("PATH", "PYTHONPATH"), ROOT, log, grace_s=1)


def main() -> int:
    run = Path(sys.argv[1])
    acts = dict(text.split("=") for text in sys.argv[2:])

    def render(stage: str, attempt: int) -> StageCommand:
        if acts.get(stage) == "ranks":
            backend = LocalBackend({stage: "tests.fake_stages.ranked"})
            return backend.render(job_of(RunLayout(run), (stage,)), {stage: attempt})[0]
        return fake_command(run, stage, attempt, acts.get(stage, "done"))

    return supervise(run, render)


if __name__ == "__main__":
    sys.exit(main())
