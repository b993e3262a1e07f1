"""What all stages share: arguments, the recipe, the process group, and the markers of success and failure."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from vqscale.arguments import OneLineParser
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.data.loader import EvaluationReader
from vqscale.data.source import Source
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.events import EventLog
from vqscale.files import write_json
from vqscale.training.distributed import Ranks, process_group


@dataclass(frozen=True)
class Stage:
    """What a stage's main is given."""

    name: str
    layout: RunLayout
    recipe: Recipe
    ranks: Ranks
    attempt: int

    def events(self, unit: str, total: int) -> EventLog | None:
        """The stage's event log on rank 0, None elsewhere."""
        if not self.ranks.first:
            return None
        return EventLog(self.layout.events(self.name), self.name, self.attempt, unit, total)

    def read_once(self, source: Source, counts: Sequence[int]) -> EvaluationReader:
        """This rank's share of a data set: over all ranks every sample once, within the recipe's error budget."""
        ranks, recipe = self.ranks, self.recipe
        budget = recipe.data.error_budget
        return EvaluationReader(source, counts, ranks.rank, ranks.world, recipe.evaluate.batch, error_budget=budget)

    def say(self, *lines: str) -> None:
        """Print lines on rank 0, into the stage's log."""
        if self.ranks.first:
            print(*lines, sep="\n", flush=True)


def run_stage(name: str, main: Callable[[Stage], dict[str, Any]]) -> None:
    """Run a stage on this rank and leave its marker.

    The marker `done.json` is written by rank 0 after all ranks have finished; it holds what `main` returned on
    rank 0. Bad input leaves `failure.json` and exit code 2, anything else `failure.json` and a traceback.

    Args:
        name: stage name as in the recipe's order.
        main: the stage; returns its figures.
    """
    try:
        layout = _run_directory(main.__doc__)
        with _recorded(layout, name):
            record(_run)(name, main, layout)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _run_directory(text: str | None) -> RunLayout:
    """The run that the command line names; `text` is what `--help` says of the stage."""
    parser = OneLineParser(prog=f"torchrun -m pipelines.{Path(sys.argv[0]).stem}", description=text)
    # Two names: under Python 3.11 torchrun takes a plain `--run` for a short form of its own `--run-path`,
    # unless `--` stands before the module.
    where = "run directory (`vqscale submit --prepare-only` makes one)"
    parser.add_argument("--run-dir", "--run", dest="run", type=Path, required=True, metavar="DIR", help=where)
    return RunLayout(parser.parse(sys.argv[1:]).run.resolve())


def _run(name: str, main: Callable[[Stage], dict[str, Any]], layout: RunLayout) -> None:
    started = time.time()
    recipe = layout.read_recipe()
    if recipe.resources.threads:
        torch.set_num_threads(recipe.resources.threads)
    else:
        cores, sharing = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, cores // sharing))
    # Where this is unset, Accelerate replaces the number of threads by its own.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    # Recorded inside: once a rank has left the group, the others fail too, and one of them could say so first.
    with process_group(recipe.resources.device, recipe.resources.timeout_s) as ranks, _recorded(layout, name):
        if ranks.first:
            layout.failure(name).unlink(missing_ok=True)  # an earlier attempt's
        ranks.barrier()
        attempt = int(os.environ.get("VQSCALE_ATTEMPT", "1"))
        figures = main(Stage(name, layout, recipe, ranks, attempt))
        ranks.barrier()
        if ranks.first:
            seconds = round(time.time() - started, 2)
            write_json(layout.done(name), {"stage": name, "attempt": attempt, "seconds": seconds, **figures})


@contextmanager
def _recorded(layout: RunLayout, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        kind = "user" if isinstance(error, UserError) else "error"
        _fail(layout, name, kind, str(error) if kind == "user" else f"{type(error).__name__}: {error}")
        raise


def _fail(layout: RunLayout, name: str, kind: str, message: str) -> None:
    """The first rank that fails says why; the others fail because of it."""
    if not layout.failure(name).exists():
        rank = int(os.environ.get("RANK", "-1"))
        write_json(layout.failure(name), {"stage": name, "kind": kind, "rank": rank, "message": message})
