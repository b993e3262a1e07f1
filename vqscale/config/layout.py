"""Where a run keeps its files: the one place that knows the names inside a run directory.

RUN/
  recipe.yaml                 the resolved recipe
  run.json                    name, creation time, command line, host
  code/                       commit, uncommitted diff, environment and versions
  state.json                  how each stage stands; written by the supervisor on the host
  supervisor.json, .log       process that runs the stages, and what it says; under Slurm the log of all jobs
  lock                        who starts, requeues or cancels the run holds it; its maker has the directory
  supervisor.lock             the supervisor holds it
  slurm.json                  numbers of the jobs, by stage (backend slurm)
  stages/STAGE/events.jsonl   one line a log step, continued over attempts
  stages/STAGE/quarantine.jsonl   bad samples, one line each
  stages/STAGE/done.json      the stage's own marker of success, with its figures
  stages/STAGE/failure.json   why the stage's processes gave up, in one line
  stages/STAGE/lost.json      machines that were lost in the newest attempt (backends ssh, kubernetes)
  stages/STAGE/preempted.json the step that was saved when the stage was asked to stop
  stages/STAGE/job.sh         the batch script (backend slurm)
  stages/STAGE/hosts.json     what is sent to each host (backend ssh)
  stages/STAGE/manifest.yaml  the object that is made for the stage (backend kubernetes)
  stages/STAGE/requeues.json  when a stage was started again by itself, why, and at which step
  stages/STAGE/trace.json     a trace that somebody asked for and that is not written yet
  stages/STAGE/traces/        traces of some steps, and tables of what takes their time
  stages/STAGE/faults.jsonl   faults on demand that have happened
  stages/STAGE/attempt-NNN/   agent.log, ranks/ (logs by rank), hang/ (stacks, if it hung)
  stages/STAGE/task-NNN/      the same files of one task, where the stage is an array
  stages/STAGE/parts/NNN.json what each task of an array has done; with all of them there the stage can be finished
  tasks/NNN.json              how each task stands, as state.json; written by the task's own host
  images/{train,validation}/  generated class folders (stage generate)
  shards/{train,validation}/  image shards (stage pack)
  checkpoints/STAGE/          committed checkpoints, where the recipe names no other place
  codes/{train,validation}/   code shards
  samples/                    drawn images, samples.json, sheet.png
  tensorboard/STAGE/          event files
  report.json, report.html    the evaluation
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vqscale.config.load import load_recipe
from vqscale.config.recipe import Recipe
from vqscale.config.section import Places
from vqscale.files import read_json

LOCK = "lock"
"""A file of every run, and of every folder of several. Whoever made it may fill the folder."""


@dataclass(frozen=True)
class RunLayout:
    """Paths inside one run directory. Makes nothing; the writers make what they need."""

    root: Path
    task: int | None = None
    """Task of an array whose own state, markers and logs are meant; None for those of the whole stage."""

    @property
    def whole(self) -> RunLayout:
        """The run without regard to tasks."""
        return RunLayout(self.root)

    def of_task(self, task: int) -> RunLayout:
        """The same run as one task of an array sees it."""
        return RunLayout(self.root, task)

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def info(self) -> Path:
        """Name, creation time, command line, host."""
        return self.root / "run.json"

    @property
    def id(self) -> str:
        """The run's name in the index; that of its directory, where nobody has put it there."""
        return str((read_json(self.info) or {}).get("id", self.root.name))

    @property
    def submitted(self) -> str | None:
        """When and where the run was made, which no other run of the same id shares; None where nobody wrote it."""
        info = read_json(self.info) or {}
        if "created" not in info:
            return None
        return f"{datetime.fromtimestamp(info['created'], UTC).isoformat()} on {info.get('host', '?')}"

    @property
    def code(self) -> Path:
        """The code's identity and the environment."""
        return self.root / "code"

    @property
    def state(self) -> Path:
        """How each stage stands, as the supervisor on the host saw it."""
        return self.root / ("state.json" if self.task is None else f"tasks/{self.task:03d}.json")

    @property
    def lock(self) -> Path:
        """Held by whoever starts, requeues or cancels the run."""
        return self.root / LOCK

    @property
    def supervisor(self) -> Path:
        """Process id and start time of the supervisor."""
        return self.root / "supervisor.json"

    @property
    def log(self) -> Path:
        """What the supervisor says; under Slurm, what the jobs and Slurm itself say."""
        return self.root / "supervisor.log"

    @property
    def slurm(self) -> Path:
        """Numbers of the Slurm jobs, by stage."""
        return self.root / "slurm.json"

    @property
    def tensorboard(self) -> Path:
        """Log directory for `tensorboard --logdir`."""
        return self.root / "tensorboard"

    @property
    def samples(self) -> Path:
        """Drawn images."""
        return self.root / "samples"

    @property
    def report(self) -> Path:
        """The evaluation."""
        return self.root / "report.json"

    @property
    def report_page(self) -> Path:
        """The same with pictures, to be looked at in a browser."""
        return self.root / "report.html"

    def stage(self, stage: str) -> Path:
        """Events, markers and attempts of a stage."""
        return self.root / "stages" / stage / ("" if self.task is None else f"task-{self.task:03d}")

    def parts(self, stage: str) -> Path:
        """What each task of an array has done."""
        return self.root / "stages" / stage / "parts"

    def events(self, stage: str) -> Path:
        """One JSON object a line and log step."""
        return self.stage(stage) / "events.jsonl"

    def done(self, stage: str) -> Path:
        """Marker that the stage's processes write when all of its output is in place."""
        return self.stage(stage) / "done.json"

    def failure(self, stage: str) -> Path:
        """One line that says why the stage's processes gave up."""
        return self.stage(stage) / "failure.json"

    def lost(self, stage: str) -> Path:
        """Names of the machines that were lost in the newest attempt; not there when none was."""
        return self.stage(stage) / "lost.json"

    def preempted(self, stage: str) -> Path:
        """Marker that the stage was asked to stop and has saved."""
        return self.stage(stage) / "preempted.json"

    def script(self, stage: str) -> Path:
        """The batch script of a stage."""
        return self.stage(stage) / "job.sh"

    def hosts(self, stage: str) -> Path:
        """What is sent to each host of a stage."""
        return self.stage(stage) / "hosts.json"

    def manifest(self, stage: str) -> Path:
        """The object of Kubernetes that is made for a stage."""
        return self.stage(stage) / "manifest.yaml"

    def requeues(self, stage: str) -> Path:
        """When the stage's job put itself back into the queue, and at which step."""
        return self.stage(stage) / "requeues.json"

    def faults(self, stage: str) -> Path:
        """Faults on demand that have happened to the stage."""
        return self.stage(stage) / "faults.jsonl"

    def trace_request(self, stage: str) -> Path:
        """Asks a stage that trains for a trace."""
        return self.stage(stage) / "trace.json"

    def traces(self, stage: str) -> Path:
        """Traces of some steps."""
        return self.stage(stage) / "traces"

    def attempt(self, stage: str, number: int) -> Path:
        """Logs of one attempt."""
        return self.stage(stage) / f"attempt-{number:03d}"

    def images(self, split: str) -> Path:
        """Generated class folders."""
        return self.root / "images" / split

    def checkpoints(self, recipe: Recipe, stage: str) -> str:
        """Committed checkpoints of a stage: a folder of this run, or one below `resources.checkpoints`, maybe a URL."""
        place = recipe.resources.checkpoints
        return f"{place.rstrip('/')}/{self.id}/{stage}" if place else str(self.root / "checkpoints" / stage)

    def codes(self, split: str) -> Path:
        """Code shards of a split."""
        return self.root / "codes" / split

    def code_shards(self, recipe: Recipe, split: str) -> str:
        """Code shards that the prior reads: those that the recipe names, or those of this run."""
        return recipe.data.code_shards(split) if recipe.data.codes else str(self.codes(split))

    def quarantine(self, stage: str) -> Path:
        """The bad samples that a stage met, one JSON object a line."""
        return self.stage(stage) / "quarantine.jsonl"

    def outputs(self, stage: str) -> tuple[Path, ...]:
        """Folders in the run that a stage fills for later ones; checkpoints may lie elsewhere (`checkpoints`)."""
        names = {
            "generate": ("images",),
            "pack": ("shards",),
            "tokenizer": ("checkpoints/tokenizer",),
            "extract": ("codes",),
            "prior": ("checkpoints/prior",),
            "sample": ("samples",),
        }
        return tuple(self.root / name for name in names.get(stage, ()))

    def shards(self, recipe: Recipe, split: str) -> Places:
        """Image shards of a split: the recipe's own, or those packed in this run."""
        if recipe.data.clocks:
            return str(self.root / "shards" / split)
        return recipe.data.train if split == "train" else recipe.data.validation

    def read_recipe(self) -> Recipe:
        """The resolved recipe of this run.

        Raises:
            UserError: the directory holds no valid recipe.
        """
        return load_recipe(self.recipe)
