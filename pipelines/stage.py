"""What all stages share: arguments, the recipe, the process group, and the markers of success and failure."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from pipelines.outcome import fail, leave_marker, node_name, recorded
from vqscale.arguments import OneLineParser
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.config.resources import Resources
from vqscale.data.bad import check_budget
from vqscale.data.loader import Batch
from vqscale.data.reader import EvaluationReader
from vqscale.data.source import Source
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.events import EventLog
from vqscale.faults import NO_FAULTS, Faults
from vqscale.files import write_bytes, write_json
from vqscale.quarantine import Quarantine
from vqscale.stamps import stamp_output
from vqscale.training.distributed import Ranks, process_group
from vqscale.training.heap import keep_heap
from vqscale.training.preemption import PreemptedError
from vqscale.training.watchdog import EXIT_HANG, Watchdog, find_hang


@dataclass(frozen=True)
class Stage:
    """What a stage's main is given."""

    name: str
    layout: RunLayout
    recipe: Recipe
    ranks: Ranks
    attempt: int
    faults: Faults = NO_FAULTS
    """Faults on demand for this rank."""
    tasks: int = 1
    """Tasks that share the stage's work, each with ranks of its own; `layout.task` says which one this is."""

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this rank's; over all ranks of all tasks each is there once."""
        place = (self.layout.task or 0) * self.ranks.world + self.ranks.rank
        return range(place, count, self.tasks * self.ranks.world)

    @property
    def resources(self) -> Resources:
        """What this stage runs on."""
        return self.recipe.resources.of(self.name)

    @property
    def lead_s(self) -> float:
        """Seconds between a request to stop and the end, as the launcher said; 0 where nobody did."""
        return float(os.environ.get("VQSCALE_GRACE_S", "0"))

    def watchdog(self) -> Watchdog:
        """Notices when this rank gives no sign of life for `resources.hang_s`; the stage ends then. Collective."""
        folder = self.layout.attempt(self.name, self.attempt)
        nodes = self.ranks.gather(node_name())

        def end() -> None:
            ranks, words = find_hang(folder, self.ranks.world)
            fail(self.layout, self.name, "hang", words, sorted({nodes[rank] for rank in ranks}))
            os._exit(EXIT_HANG)

        return Watchdog(folder, self.ranks.rank, self.resources.hang_s, end)

    def events(self, unit: str, total: int) -> EventLog | None:
        """The stage's event log on rank 0, None elsewhere."""
        if not self.ranks.first:
            return None
        return EventLog(self.layout.events(self.name), self.name, self.attempt, unit, total)

    def read_once(self, source: Source, counts: Sequence[int]) -> Iterator[Batch]:
        """This rank's share of a data set, to be read to its end by every rank: over all ranks every sample once.

        Raises:
            UserError: more bad samples, over all ranks, than the recipe's error budget.
        """
        ranks, data = self.ranks, self.recipe.data
        reader = EvaluationReader(
            source,
            counts,
            ranks.rank,
            ranks.world,
            self.recipe.evaluate.batch,
            threads=data.threads,
            error_budget=data.error_budget,
        )
        yield from reader
        self.judge(reader.bad, reader.read, reader.bad_samples)

    def judge(self, kinds: Mapping[str, int], read: int, bad: Sequence[tuple[str, str, str]]) -> None:
        """Put all ranks' bad samples on the stage's quarantine list and compare them with the error budget; collective.

        Args:
            kinds: kind → bad samples of this rank.
            read: samples that this rank read.
            bad: (shard, key, kind) of the bad ones.

        Raises:
            UserError: they are too many; on every rank.
        """
        gathered = self.ranks.gather((Counter(kinds), read, list(bad)))
        if self.ranks.first:
            Quarantine(self.layout.quarantine(self.name)).add([row for part in gathered for row in part[2]])
        total: Counter[str] = sum((part[0] for part in gathered), Counter())
        check_budget(total, sum(part[1] for part in gathered), self.recipe.data.error_budget)

    def say(self, *lines: str) -> None:
        """Print lines on rank 0, into the stage's log."""
        if self.ranks.first:
            print(*lines, sep="\n", flush=True)


Main = Callable[[Stage], dict[str, Any]]
"""A rank's share of a stage; what it returns on rank 0 are the stage's figures."""
Finish = Callable[[Stage, list[dict[str, Any]]], dict[str, Any]]
"""What is done once, on rank 0, when all shares are done: from the figures of all tasks to those of the stage."""


def run_stage(name: str, main: Main, finish: Finish | None = None) -> None:
    """Run a stage on this rank and leave its marker.

    The marker `done.json` is written by rank 0 after all ranks have finished; it holds what `main` returned on
    rank 0, or what `finish` made of it. Of an array, each task leaves what it has done in the folder of the stage's
    parts, and whoever then sees all of them there finishes the stage. That may be several at once, or one again after a
    kill: `finish` has to write whole files, and the same ones each time.

    A stage that was asked to stop, and saved, leaves `preempted.json`. Bad input leaves `failure.json` and exit code 2,
    anything else `failure.json` and a traceback.

    Args:
        name: stage name as in the recipe's order.
        main: the stage; returns its figures.
        finish: what is left to do when all tasks have done their share; needed by stages that can be arrays.
    """
    try:
        _sign_logs()
        layout, tasks = _run_directory(main.__doc__), int(os.environ.get("VQSCALE_TASKS", "1"))
        if tasks > 1:
            layout = layout.of_task(int(os.environ["VQSCALE_TASK"]))
        with recorded(layout, name):
            record(_run)(name, main, finish, layout, tasks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _sign_logs() -> None:
    """Stamp this rank's logs, and leave its rank beside them: torch's agent names folders by the rank on the node."""
    place, rank = os.environ.get("TORCHELASTIC_ERROR_FILE"), os.environ.get("RANK")
    if place and rank:
        stamp_output()
        write_bytes(Path(place).with_name("rank"), rank.encode())


def _run_directory(text: str | None) -> RunLayout:
    """The run that the command line names; `text` is what `--help` says of the stage."""
    parser = OneLineParser(prog=f"torchrun -m pipelines.{Path(sys.argv[0]).stem}", description=text)
    # Two names: under Python 3.11 torchrun takes a plain `--run` for a short form of its own `--run-path`,
    # unless `--` stands before the module.
    where = "run directory (`vqscale submit --prepare-only` makes one)"
    parser.add_argument("--run-dir", "--run", dest="run", type=Path, required=True, metavar="DIR", help=where)
    return RunLayout(parser.parse(sys.argv[1:]).run.resolve())


def _run(name: str, main: Main, finish: Finish | None, layout: RunLayout, tasks: int) -> None:
    started = time.time()
    recipe = layout.read_recipe()
    resources = recipe.resources.of(name)
    if resources.threads:
        torch.set_num_threads(resources.threads)
    else:
        cores, sharing = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores // sharing))
    # Where this is unset, Accelerate replaces the number of threads by its own.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    # Recorded inside: once a rank has left the group, the others fail too, and one of them could say so first.
    with process_group(resources.device, resources.timeout_s) as ranks, recorded(layout, name):
        if ranks.device.type == "cpu":
            keep_heap()
        if ranks.first:
            for earlier in (layout.failure(name), layout.preempted(name)):
                earlier.unlink(missing_ok=True)
        ranks.barrier()
        attempt = int(os.environ.get("VQSCALE_ATTEMPT", "1"))
        faults = Faults.from_environment(name, ranks.rank, layout.faults(name))
        stage = Stage(name, layout, recipe, ranks, attempt, faults, tasks)
        head = {"stage": name, "attempt": attempt}
        try:
            facts = main(stage)
        except PreemptedError as stop:
            stage.say(f"preempted by {stop}")
            facts, finish = {**stop.facts(), "lead_s": stage.lead_s}, None
            write = functools.partial(write_json, layout.preempted(name))
        else:
            once = functools.partial(finish, stage) if finish else None
            write = functools.partial(leave_marker, layout, name, tasks, once)
        ranks.barrier()
        if ranks.first:
            write({**head, "seconds": round(time.time() - started, 2), **facts})
        ranks.barrier()
