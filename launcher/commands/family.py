"""`vqscale family`: train the members of a list, and compare them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launcher import registry, sweeper
from launcher import sweep as sweeps
from launcher.backends import backend_for
from launcher.backends.base import Queue
from launcher.family import (
    FACTS,
    MARKDOWN,
    PAGE,
    RECORD,
    FamilyPlan,
    load_family,
    make_family_plan,
    read_record,
    write_comparison,
)
from launcher.locks import alone
from launcher.plan import load_profile
from launcher.recipes import find_family
from launcher.rundir import create
from launcher.status import RunStatus, read_status
from launcher.sweep import Sweep
from launcher.watch import EXIT_FAILED, follow_many
from vqscale.arguments import refuse_both
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import write_json


def family(arguments: argparse.Namespace) -> int:
    """Start a family, go on with one, or write its comparison."""
    refuse_both(arguments, "vqscale family", "--follow", "--json")
    if arguments.at_most is not None and arguments.at_most < 1:
        raise UserError(f"{arguments.at_most} runs at a time", where="--at-most", mend="use 1 or more")
    found = sweeps.find(arguments.list)
    if found and read_record(found[0]):
        return _known(*found, arguments)
    if arguments.page:
        raise UserError("is no folder of a family", where=arguments.list, mend="vqscale family LIST makes one")
    made = _plan(arguments)
    if arguments.plan:
        _print_plan(made, arguments.json)
        return 0
    made = _claimed(made, arguments)
    with alone(made.folder):
        sweep = _create(made, arguments)
    if arguments.prepare_only:
        _announce(made.folder, sweep, arguments, started=False)
        return 0
    return _start(made.folder, sweep, arguments)


def _known(folder: Path, sweep: Sweep, arguments: argparse.Namespace) -> int:
    """A family that is there: its page, or what is left of it."""
    given = [*arguments.overrides, *filter(None, [arguments.members, arguments.out])]
    if given or arguments.plan or arguments.prepare_only:
        what = "its members and settings are as they were made"
        raise UserError(what, where=sweep.id, mend="name the list and --out to add members")
    if arguments.page:
        return _conclude(folder, sweep, arguments)
    return _start(folder, sweep, arguments)


def _plan(arguments: argparse.Namespace) -> FamilyPlan:
    path = find_family(arguments.list)
    family, overrides = load_family(path, arguments.overrides)
    if arguments.members is not None:
        family = family.chosen([name.strip() for name in arguments.members.split(",") if name.strip()])
    asked = Path(arguments.out).expanduser().resolve() if arguments.out else None
    if asked is None or not _goes_on(asked):
        asked = registry.choose_directory(f"family-{family.family}", arguments.out, option="--out")
    return make_family_plan(family, path.parent, asked, arguments.on, overrides)


def _goes_on(folder: Path) -> bool:
    return (folder / RECORD).exists()


def _claimed(made: FamilyPlan, arguments: argparse.Namespace) -> FamilyPlan:
    """The plan, with a folder that nobody else fills: one that was asked for and goes on, or a new one."""
    registry.require_writable()
    if arguments.out and _goes_on(made.folder):
        return made
    while not registry.make_directory(made.folder):
        if arguments.out:
            raise registry.taken(made.folder)
        made = _plan(arguments)
    return made


def _create(made: FamilyPlan, arguments: argparse.Namespace) -> Sweep:
    """Make the runs that are not there yet.

    Raises:
        UserError: a run is there, but with other settings.
    """
    there = Sweep.read(made.folder)
    new = [plan for plan in made.plans if not RunLayout(plan.job.run).info.exists()]
    for plan in made.plans:
        if plan not in new and RunLayout(plan.job.run).read_recipe() != plan.job.recipe:
            mend = "choose another --out DIR, or go on as it was made: vqscale family " + str(made.folder)
            raise UserError("is there with other settings", where=plan.job.run.name, mend=mend)
    backend = backend_for(load_profile(arguments.on))
    for plan in new:
        if not arguments.prepare_only:
            backend.check(plan.job)
    write_json(made.folder / RECORD, made.record(read_record(made.folder)))  # first: who is stopped here can go on
    for plan in new:
        create(plan)
    kept = there.runs if there else []
    runs = [*kept, *(run for run in made.runs if run not in kept)]
    most = arguments.at_most or (len(runs) if isinstance(backend, Queue) else 1)
    sweep = Sweep(made.folder.name, {}, runs, most, {**(there.after if there else {}), **made.after})
    if there:
        sweep.runner = there.runner
    sweep.enter(made.folder)
    for warning in dict.fromkeys(warning for plan in made.plans for warning in plan.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    return sweep


def _start(folder: Path, sweep: Sweep, arguments: argparse.Namespace) -> int:
    """Start what is left, unless all is done; then show the progress, or how to see it."""
    statuses = _statuses(folder, sweep)
    if all(status.state == "done" for status in statuses):
        return _conclude(folder, sweep, arguments)
    if not any(status.alive or status.queued for status in statuses):
        sweeper.go_on(folder, sweep)
    if not arguments.follow:
        _announce(folder, sweep, arguments, started=True)
        return 0
    try:
        follow_many(lambda: _statuses(folder, sweep))
    except KeyboardInterrupt:
        print(f"\n{sweep.id} goes on; vqscale family {sweep.id} --follow shows it, vqscale cancel {sweep.id} ends it")
        return 0
    return _conclude(folder, sweep, arguments)


def _conclude(folder: Path, sweep: Sweep, arguments: argparse.Namespace) -> int:
    """Write the comparison and print it."""
    write_comparison(folder)
    if arguments.json:
        print((folder / FACTS).read_text(encoding="utf-8"), end="")
    else:
        print((folder / MARKDOWN).read_text(encoding="utf-8"))
        print(f"page       {folder / PAGE}")
    return 0 if all(status.state == "done" for status in _statuses(folder, sweep)) or arguments.page else EXIT_FAILED


def _statuses(folder: Path, sweep: Sweep) -> list[RunStatus]:
    return [read_status(layout, depth="current") for layout in sweep.layouts(folder)]


def _announce(folder: Path, sweep: Sweep, arguments: argparse.Namespace, started: bool) -> None:
    if arguments.json:
        print(json.dumps({"id": sweep.id, "path": str(folder), "runs": sweep.runs, "started": started}, indent=2))
        return
    print(f"family     {sweep.id}{'' if started else ' (prepared, not started)'}: {len(sweep.runs)} members")
    print(f"directory  {folder}")
    if not started:
        print(f"start it:  vqscale family {sweep.id}")
        return
    print(f"watch it:  vqscale family {sweep.id} --follow")
    print(f"compare:   vqscale family {sweep.id} --page")
    print(f"stop it:   vqscale cancel {sweep.id}")


def _print_plan(made: FamilyPlan, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"path": str(made.folder), **made.record()}, indent=2))
        return
    budget = made.family.budget
    print(f"family     {made.family.family}: {len(made.plans)} members, below {made.folder}")
    print(f"budget     {budget.tokenizer:,} images for each tokenizer, {budget.prior:,} for each prior")
    width = max(len(member.name) for member in made.family.members)
    for member, plan in zip(made.family.members, made.plans, strict=True):
        shares = f"  ({', '.join(plan.shares.stages)} of {plan.shares.run.name})" if plan.shares else ""
        print(f"  {member.name:{width}}  {', '.join(plan.job.stages)}{shares}")
    for warning in dict.fromkeys(warning for plan in made.plans for warning in plan.warnings):
        print(f"warning: {warning}", file=sys.stderr)
