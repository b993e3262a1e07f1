"""What every backend can do, and the data that passes between it and the rest of the launcher."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cluster.profile import Profile
from cluster.rendezvous import Variable, agent_environment, inherited, thread_environment
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.config.resources import Resources

SOURCE = Path(__file__).resolve().parents[2]
"""Folder of the packages; the supervisor and the stages start in it."""

STAGE_MODULES = {
    "generate": "pipelines.generate",
    "pack": "pipelines.pack",
    "tokenizer": "pipelines.train_tokenizer",
    "extract": "pipelines.extract_codes",
    "prior": "pipelines.train_prior",
    "sample": "pipelines.sample",
    "evaluate": "pipelines.evaluate",
}
"""The main of each stage."""

STAGE_TAG = "VQSCALE_STAGE_OF"
"""Variable that every process of a stage carries: the run directory it belongs to."""
TASK_TAG = "VQSCALE_TASK_OF"
"""Variable that every process of a task carries besides: the task's own folder in the run directory."""
ATTEMPT = "VQSCALE_ATTEMPT"
"""Variable with the number of the stage's attempt."""


@dataclass(frozen=True)
class Place:
    """The machines of one stage."""

    cores: int
    """Cores that may be used on each."""
    nodes: int = 1
    """Machines that share the processes of the stage, or of each of its tasks, evenly."""


@dataclass(frozen=True)
class Job:
    """Everything that decides how stages are started; `render` looks at nothing else."""

    recipe: Recipe
    profile: Profile
    run: Path
    stages: tuple[str, ...]
    python: str
    """Interpreter of the stages."""
    source: Path
    """Folder that holds the packages `pipelines` and `vqscale`; stages start in it."""
    places: Mapping[str, Place]
    """Stage → its machines."""
    task: int | None = None
    """The task of an array that is started; None for a stage as a whole."""

    @property
    def layout(self) -> RunLayout:
        """The run, or the one task."""
        return RunLayout(self.run, self.task)

    def resources(self, stage: str) -> Resources:
        """What a stage runs on."""
        return self.recipe.resources.of(stage)

    def processes_per_node(self, stage: str) -> int:
        """Processes of a stage on each of its machines."""
        return self.resources(stage).processes // self.places[stage].nodes

    def variables(self, stage: str, attempt: int | None = None) -> tuple[Variable, ...]:
        """Variables of a stage.

        Args:
            stage: name of the stage.
            attempt: number of its attempt; None where it is known only when the stage starts.
        """
        profile, threads = self.profile, self.resources(stage).threads
        return (
            *thread_environment(threads, self.processes_per_node(stage), self.places[stage].cores),
            *agent_environment(grace_s=profile.grace_s),
            *(Variable(name, value, f"profile {profile.name}") for name, value in profile.environment.items()),
            *((Variable(ATTEMPT, str(attempt), "launcher"),) if attempt is not None else ()),
            Variable("VQSCALE_GRACE_S", str(profile.grace_s), f"profile {profile.name}"),
            Variable(STAGE_TAG, str(self.run), "launcher"),
            *(
                task_variables(self.layout, stage, self.recipe.resources.array_of(stage))
                if self.task is not None
                else ()
            ),
        )


def task_variables(layout: RunLayout, stage: str, tasks: int) -> tuple[Variable, ...]:
    """Variables of one task of an array: which one, of how many, and whose its processes are."""
    return (
        Variable("VQSCALE_TASK", str(layout.task), "launcher"),
        Variable("VQSCALE_TASKS", str(tasks), f"resources.stages.{stage}.array"),
        Variable(TASK_TAG, str(layout.stage(stage)), "launcher"),
    )


@dataclass(frozen=True)
class StageCommand:
    """One stage, ready to start."""

    stage: str
    attempt: int
    argv: tuple[str, ...]
    variables: tuple[Variable, ...]
    """Set for the stage, above what it inherits; a later one overrides an earlier one."""
    inherit: tuple[str, ...]
    """Allow-list of variables taken over from the surroundings."""
    directory: Path
    log: Path
    """Where the output of the command itself goes; ranks have logs of their own."""
    grace_s: int
    """Seconds between the request to stop and the kill."""
    script: str = ""
    """Content of the file that the last word of `argv` names, where the command hands over such a file."""

    def environment(self, surroundings: Mapping[str, str] | None = None) -> dict[str, str]:
        """The whole environment of the stage."""
        taken = inherited(os.environ if surroundings is None else surroundings, self.inherit)
        return taken | {variable.name: variable.value for variable in self.variables}

    def shell(self) -> str:
        """The command as one would type it, an option a line."""
        words = [shlex.quote(word) for word in self.argv]
        lines: list[str] = []
        line = words[0]
        for word in words[1:]:
            if word != "--" and (word.startswith("--") or (word == "-m" and lines)):
                lines.append(line)
                line = word
            else:
                line += f" {word}"
        return " \\\n    ".join([*lines, line])

    def facts(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "stage": self.stage,
            "attempt": self.attempt,
            "argv": list(self.argv),
            "environment": [{"name": v.name, "value": v.value, "source": v.source} for v in self.variables],
            "inherit": list(self.inherit),
            "directory": str(self.directory),
            "log": str(self.log),
            "grace_s": self.grace_s,
            "script": self.script,
        }


@dataclass(frozen=True)
class Poll:
    """What the backend itself knows of a run, whatever the run directory says."""

    alive: bool | None
    """Whether someone runs the stages; None when this machine cannot tell."""
    words: str
    """The same in plain words, such as `supervisor 4711 on this host`."""
    begun: bool = True
    """Whether the run was ever started."""
    who: str = "supervisor"
    """Who it is that runs the stages."""
    note: str = ""
    """What the run directory cannot know: what a job waits for, or that it disagrees; empty when there is nothing."""


class Backend(Protocol):
    """A way to run stages. `render` is pure; what `plan` prints is what `submit` starts."""

    def render(self, job: Job, attempts: Mapping[str, int] | None = None) -> tuple[StageCommand, ...]:
        """Commands of the job's stages; `attempts` gives the number of each stage's attempt (else 1)."""

    def check(self, job: Job) -> None:
        """Refuse, before anything is made, what cannot be started from here."""

    def submit(self, layout: RunLayout) -> Poll:
        """Start the prepared run; returns at once."""

    def poll(self, layout: RunLayout) -> Poll:
        """Whether someone runs the stages now."""

    def cancel(self, layout: RunLayout) -> None:
        """Stop the run and wait until none of its processes is left."""


@runtime_checkable
class Queue(Protocol):
    """A backend that keeps runs waiting by itself, so that nobody has to stay to start them."""

    def submit_after(self, layout: RunLayout, earlier: Sequence[RunLayout]) -> Poll:
        """Submit a prepared run that starts when all of the others have ended, however they did."""
