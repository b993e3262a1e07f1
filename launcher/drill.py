"""Drills: a stage of a run is repeated with faults, and its result compared with that of an undisturbed repetition.

A repetition has a run directory of its own below RUN/drill, which borrows the data from the run. Under a fault a stage
may fail; it is started again as `vqscale requeue` would, until it is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import process
from launcher.backends.base import SOURCE, STAGE_TAG
from launcher.job import make_job
from launcher.plan import load_profile
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.config.load import dump_yaml
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.faults import VARIABLE, Fault
from vqscale.files import read_json, write_bytes, write_json
from vqscale.stages import DRILLED

_TOKENIZER = "checkpoints/tokenizer"
_BORROWED = ("images", "shards", "codes")
_MAKES = {"tokenizer": _TOKENIZER, "extract": "codes", "prior": "checkpoints/prior"}
_MOST_STARTS = 4
_MOST_STEPS = 24
_EARLY = ("training.warmup", "quantizer.continuous_steps", "losses.adversarial.start", "kl_warmup")
"""Settings that count steps from the first on; as they are, they might leave nothing of a short training."""
_CHANGES_THE_RESULT = {"nan": "a step was left out"}
"""Faults after which the result cannot be the undisturbed one, and why."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL from outside, at any moment of a repetition, start and save included."""

    after_s: float
    """Seconds after the stage's processes were started."""
    rank: int

    def __str__(self) -> str:
        return f"SIGKILL to rank {self.rank} after {self.after_s:.2f} s"


@dataclass(frozen=True)
class Outcome:
    """What became of a stage under a fault."""

    stage: str
    fault: str
    starts: int
    """How often the stage was started."""
    resumed: tuple[int, ...]
    """Step that each start but the first went on from."""
    seconds: float
    result: str
    """In words."""
    good: bool
    """Whether the result is what it has to be."""

    def facts(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return asdict(self)


class Drill:
    """Repeats one stage of a run.

    Args:
        run: where data comes from; earlier stages must be done.
        recipe: of the repetitions: the run's, shortened.
        stage: one of `DRILLED`.

    Raises:
        UserError: this machine cannot run it, or its input is not there.
    """

    def __init__(self, run: RunLayout, recipe: Recipe, stage: str) -> None:
        self.run, self.recipe, self.stage = run, recipe, stage
        self._profile, self._borrowed = load_profile("local"), self._places()
        make_job(recipe, self._profile, run.root, (stage,))
        self._folder = run.root / "drill" / stage
        shutil.rmtree(self._folder, ignore_errors=True)
        self._reference = self._repetition("undisturbed")
        self.seconds = 0.0
        """What the undisturbed repetition took, from the start of its processes."""

    def undisturbed(self) -> Outcome:
        """Run the repetition that all others are compared with.

        Raises:
            UserError: it does not finish.
        """
        began = time.monotonic()
        self._start(self._reference, {})
        self.seconds = time.monotonic() - began
        if not self._reference.done(self.stage).exists():
            message = RunState.read(self._reference).stages[self.stage].message
            raise UserError(f"fails undisturbed: {message}", where=str(self._reference.root))
        return Outcome(self.stage, "none", 1, (), self.seconds, "the reference", True)

    def under(self, fault: Fault | Kill, number: int) -> Outcome:
        """Repeat the stage under a fault until it is done, and compare; its directory is removed if all is well."""
        layout, began = self._repetition(f"{number:03d}"), time.monotonic()
        kill = fault if isinstance(fault, Kill) else None
        surroundings = {} if kill else {VARIABLE: str(fault)}
        starts = 0
        while not layout.done(self.stage).exists() and starts < _MOST_STARTS:
            self._start(layout, surroundings, kill if not starts else None)
            starts += 1
        if kill and starts == 1:  # this time the stage was faster than the reference, and ended before
            shutil.rmtree(layout.root)
            return self.under(Kill(kill.after_s / 2, kill.rank), number)
        result, good = self._compare(layout, fault)
        seconds = time.monotonic() - began
        outcome = Outcome(self.stage, str(fault), starts, self._resumed(layout), seconds, result, good)
        if good:
            shutil.rmtree(layout.root)
        return outcome

    def _repetition(self, name: str) -> RunLayout:
        layout = RunLayout(self._folder / name)
        write_bytes(layout.recipe, dump_yaml(self.recipe).encode())
        RunState.new((self.stage,)).write(layout)
        # The supervisor that is disturbed is the one of this machine, wherever the run itself was.
        changed = {
            "id": f"{self.run.root.name}-drill-{self.stage}-{name}",
            "profile": self._profile.model_dump(mode="json"),
        }
        write_json(layout.info, {**read_json(self.run.info), **changed})
        for place, target in self._borrowed.items():
            (layout.root / place).parent.mkdir(parents=True, exist_ok=True)
            (layout.root / place).symlink_to(target)
        return layout

    def _places(self) -> dict[str, Path]:
        """Place in a repetition → what of the run is linked there."""
        tokenizer = self.run.checkpoints(self.run.read_recipe(), "tokenizer")
        if self.stage != "tokenizer" and "://" in tokenizer:
            mend = "copy its checkpoints to a disk, or drill the tokenizer"
            raise UserError("reads the tokenizer, which no link can lead to", where=tokenizer, mend=mend)
        found = {place: self.run.root / place for place in _BORROWED} | {_TOKENIZER: Path(tokenizer)}
        return {place: path for place, path in found.items() if place != _MAKES[self.stage] and path.exists()}

    def _start(self, layout: RunLayout, surroundings: Mapping[str, str], kill: Kill | None = None) -> None:
        """One supervisor from its start to its end."""
        environment = {**{k: v for k, v in os.environ.items() if k != VARIABLE}, **surroundings}
        command = [sys.executable, "-m", "launcher.supervise", str(layout.root)]
        with layout.log.open("ab") as log:
            supervisor = subprocess.Popen(command, cwd=SOURCE, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            if kill:
                _strike(layout, supervisor, kill)
            supervisor.wait()
        finally:  # an interrupted drill leaves nothing behind
            supervisor.terminate()
            supervisor.wait()

    def _compare(self, layout: RunLayout, fault: Fault | Kill) -> tuple[str, bool]:
        if not layout.done(self.stage).exists():
            return f"not done: {RunState.read(layout).stages[self.stage].message}", False
        ours, theirs = self._files(layout), self._files(self._reference)
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        steps = _differing_steps(_losses(self._reference, self.stage), _losses(layout, self.stage))
        if not different and not steps:
            return "identical", True
        told = [f"losses from step {steps[0]}"] if steps else []
        told += [f"{len(different)} of {len(theirs)} files, {different[0]} first"] if different else []
        reason = _CHANGES_THE_RESULT.get(fault.action) if isinstance(fault, Fault) else None
        return (f"goes on; {reason}", True) if reason else ("differs: " + ", ".join(told), False)

    def _files(self, layout: RunLayout) -> dict[str, str]:
        """Name → sha256 of what the stage has made: code shards, or the last checkpoint's tensors."""
        folder = layout.root / _MAKES[self.stage]
        if self.stage == "extract":
            made = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        else:
            folder = max(folder.glob("step-*"))
            made = sorted(folder.glob("*.safetensors"))
        return {str(path.relative_to(folder)): _sha256(path, layout.root) for path in made}

    def _resumed(self, layout: RunLayout) -> tuple[int, ...]:
        first: dict[int, int] = {}
        for event in _events(layout, self.stage):
            if "event" not in event:  # a line of progress
                first.setdefault(event["attempt"], event["step"] - 1)
        return tuple(step for attempt, step in first.items() if attempt > 1)


def _strike(layout: RunLayout, supervisor: subprocess.Popen[bytes], kill: Kill) -> None:
    """Kill a rank when the time has come, or as soon as there is one after that."""
    limit = time.monotonic() + kill.after_s
    while supervisor.poll() is None:
        time.sleep(0.01)
        if time.monotonic() < limit:
            continue
        for pid in process.tagged(STAGE_TAG, str(layout.root)):
            if process.variable(pid, "RANK") == str(kill.rank):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return


def shortened(recipe: Recipe, stage: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of a repetition: short, every step's loss on record, several checkpoints; the user's above them.

    Each keeps its checkpoints to itself: they are compared, and thrown away.

    Raises:
        UserError: the stage cannot be drilled.
    """
    if stage not in DRILLED:
        raise UserError(f"'{stage}' cannot be drilled", where="--stage", mend=f"stages: {', '.join(DRILLED)}")
    own = "resources.checkpoints=''"
    if stage == "extract":
        return [*overrides, own]
    section, asked = getattr(recipe, stage), dict(text.partition("=")[::2] for text in overrides)
    told = asked.get(f"{stage}.training.steps", "")
    steps = int(told) if told.isdecimal() else min(section.training.steps, _MOST_STEPS)
    training = {"steps": steps, "log_every": 1, "checkpoint_every": max(1, steps // 4), "validate_every": steps}
    set_here = {f"training.{name}": value for name, value in training.items()}
    set_here |= {name: min(value, steps // 4) for name in _EARLY if (value := _setting(section, name))}
    return [*(f"{stage}.{name}={value}" for name, value in set_here.items()), "resources.hang_s=30", *overrides, own]


def _setting(section: Any, name: str) -> int:
    """A setting below a section; 0 where there is none of that name."""
    for part in name.split("."):
        section = getattr(section, part, None)
    return section or 0


def standard_faults(recipe: Recipe, stage: str) -> list[Fault]:
    """One of each kind that needs nobody to end it, in the middle of training, at the last rank where it matters."""
    training, last = getattr(recipe, stage).training, recipe.resources.of(stage).processes - 1
    middle = training.steps // 2
    save = middle // training.checkpoint_every * training.checkpoint_every or training.checkpoint_every
    return [
        Fault("kill", middle, last),
        Fault("kill", middle, 0, "all-reduce"),
        Fault("kill", save, last, "before-save"),
        Fault("kill", save, 0, "during-save"),
        Fault("kill", save, 0, "after-save"),
        Fault("kill", 0, last, "loader"),
        Fault("exception", middle, last),
        Fault("enospc", save, 0, "during-save"),
        Fault("stop", middle, last),
        Fault("slow", middle, last),
        Fault("nan", middle, last),
        Fault("truncate-shard", 0, 0, "loader"),
    ]


def random_kills(recipe: Recipe, stage: str, number: int, seed: int, seconds: float) -> list[Fault | Kill]:
    """Kills at random moments: half of them at a random step and point, half by the clock.

    Args:
        recipe: of the repetitions.
        stage: what is killed; `extract` by the clock alone.
        number: how many.
        seed: the same gives the same list, but for the clock's share of it.
        seconds: what the undisturbed repetition took.
    """
    draw, ranks = random.Random(seed), recipe.resources.of(stage).processes
    by_clock = [Kill(draw.uniform(0, seconds), draw.randrange(ranks)) for _ in range(number)]
    if stage == "extract":
        return [*by_clock]
    training = getattr(recipe, stage).training
    saves = range(training.checkpoint_every, training.steps + 1, training.checkpoint_every)

    def at_a_point() -> Fault:
        point = draw.choice(("step", "all-reduce", "before-save", "during-save", "after-save"))
        step = draw.choice(saves) if point.endswith("save") else draw.randrange(training.steps)
        return Fault("kill", step, draw.randrange(ranks), point)

    return [at_a_point() if number % 2 else kill for number, kill in enumerate(by_clock)]


def _losses(layout: RunLayout, stage: str) -> dict[int, set[float]]:
    """Step → all losses that any attempt has recorded for it."""
    found: dict[int, set[float]] = {}
    for event in _events(layout, stage):
        if "loss" in event:
            found.setdefault(event["step"], set()).add(event["loss"])
    return found


def _differing_steps(ours: Mapping[int, set[float]], theirs: Mapping[int, set[float]]) -> list[int]:
    return sorted(step for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step))


def _events(layout: RunLayout, stage: str) -> list[dict[str, Any]]:
    """Whole lines of the stage's events; a killed process may have left a part of one."""
    path = layout.events(stage)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _sha256(path: Path, run: Path) -> str:
    """Of a file's content, in which the run's own directory, as manifests name it, is like that of any other run."""
    content = path.read_bytes()
    return hashlib.sha256(content.replace(str(run).encode(), b"RUN") if path.suffix == ".json" else content).hexdigest()
