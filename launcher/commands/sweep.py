"""Sweeps on the command line: what `plan`, `submit` and `cancel` do with several runs at once."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launcher import registry, sweeper
from launcher import sweep as sweeps
from launcher.backends import backend_for
from launcher.backends.base import Queue
from launcher.locks import alone
from launcher.plan import Plan, make_plan
from launcher.recipes import find_recipe
from launcher.rundir import create
from launcher.sweep import Sweep
from vqscale.config.layout import RunLayout
from vqscale.config.load import load_recipe
from vqscale.errors import EXIT_USER_ERROR, UserError


def plan(arguments: argparse.Namespace) -> int:
    """Print the runs of a sweep, all of them checked."""
    folder, sweep, plans = _plans(arguments)
    if arguments.json:
        runs = [{"id": run, "overrides": list(made.overrides)} for run, made in zip(sweep.runs, plans, strict=True)]
        print(json.dumps({"id": sweep.id, "path": str(folder), "at_most": sweep.at_most, "runs": runs}, indent=2))
        return 0
    print(f"sweep      {len(plans)} runs, {sweep.at_most} at a time, below {folder}")
    _print_runs(arguments, sweep, plans)
    print("one of them in full: vqscale plan with its settings in place of --sweep")
    return 0


def submit(arguments: argparse.Namespace) -> int:
    """Make all runs of a sweep, then start them."""
    if arguments.follow:
        raise UserError("--follow shows one run", where="vqscale submit --sweep", mend="vqscale status --watch")
    registry.require_writable()
    folder, sweep, plans = _plans(arguments)
    if not arguments.prepare_only:
        _check(plans)
    while not registry.make_directory(folder):
        if arguments.run:
            raise registry.taken(folder)
        folder, sweep, plans = _plans(arguments)
    layouts: list[RunLayout] = []
    try:
        for made in plans:
            layouts.append(create(made))
        sweep.enter(folder)
        if not arguments.prepare_only:
            with alone(folder):
                sweeper.start(folder, sweep, layouts)
    except BaseException:
        sweeper.discard(folder, layouts)
        raise
    if arguments.json:
        facts = {"id": sweep.id, "path": str(folder), "runs": sweep.runs, "started": not arguments.prepare_only}
        print(json.dumps(facts, indent=2))
        return 0
    print(f"sweep      {sweep.id}{' (prepared, not started)' if arguments.prepare_only else ''}: {len(plans)} runs")
    print(f"directory  {folder}")
    _print_runs(arguments, sweep, plans)
    if arguments.prepare_only:
        print(f"start it:  vqscale requeue {sweep.id}")
        return 0
    print(f"watch it:  vqscale status {sweep.id} --watch")
    print(f"stop it:   vqscale cancel {sweep.id}")
    return 0


def cancel(folder: Path, sweep: Sweep, as_json: bool) -> int:
    """Stop all of a sweep."""
    outcome = sweeper.cancel(folder, sweep)
    facts = {"id": sweep.id, "cancelled": outcome.runs, "faults": outcome.faults}
    print(json.dumps(facts) if as_json else f"{sweep.id}: {len(outcome.runs)} runs cancelled")
    return _concluded(outcome)


def requeue(folder: Path, sweep: Sweep, as_json: bool) -> int:
    """Start what is left of a sweep."""
    outcome = sweeper.go_on(folder, sweep)
    facts = {"id": sweep.id, "runs": outcome.runs, "faults": outcome.faults}
    print(json.dumps(facts) if as_json else f"{sweep.id} goes on with {len(outcome.runs)} runs")
    return _concluded(outcome)


def _concluded(outcome: sweeper.Outcome) -> int:
    """What could not be done with some of the runs, when it was done with all others."""
    for fault in outcome.faults:
        print(f"error: {fault}", file=sys.stderr)
    return EXIT_USER_ERROR if outcome.faults else 0


def _check(plans: list[Plan]) -> None:
    """Ask the backend once for each kind of resources."""
    backend = backend_for(plans[0].job.profile)
    for made in {repr((made.job.recipe.resources, made.job.stages)): made for made in plans}.values():
        backend.check(made.job)


def _plans(arguments: argparse.Namespace) -> tuple[Path, Sweep, list[Plan]]:
    """Every run of the sweep, resolved and checked before anything is made."""
    axes = [sweeps.parse_axis(text) for text in arguments.sweep]
    found = sweeps.points(axes)
    if arguments.at_most is not None and arguments.at_most < 1:
        raise UserError(f"{arguments.at_most} runs at a time", where="--at-most", mend="use 1 or more")
    name = load_recipe(find_recipe(arguments.recipe), [*arguments.overrides, *found[0]]).name
    folder = registry.choose_directory(name, arguments.run)
    ids = [f"{folder.name}.{number}" for number in range(len(found))]
    plans = [
        make_plan(
            arguments.recipe,
            arguments.on,
            [*arguments.overrides, *overrides],
            run=folder / run,
            stages=arguments.stages,
        )
        for run, overrides in zip(ids, found, strict=True)
    ]
    queued = isinstance(backend_for(plans[0].job.profile), Queue)
    most = arguments.at_most or (len(plans) if queued else 1)
    return folder, Sweep(folder.name, dict(axes), ids, most), plans


def _print_runs(arguments: argparse.Namespace, sweep: Sweep, plans: list[Plan]) -> None:
    swept = len(arguments.overrides)
    for run, made in zip(sweep.runs, plans, strict=True):
        print(f"  {run}  {' '.join(made.overrides[swept:])}")
    for warning in dict.fromkeys(warning for made in plans for warning in made.warnings):
        print(f"warning: {warning}", file=sys.stderr)
