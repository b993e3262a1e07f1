"""Commands that change runs: cancel, requeue."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext

from cluster.profile import Profile
from launcher.backends import Backend, backend_for
from launcher.commands.start import follow_or_detach
from launcher.commands.sweep import cancel as cancel_sweep
from launcher.commands.sweep import requeue as requeue_sweep
from launcher.locks import alone
from launcher.moving import move
from launcher.plan import select_stages
from launcher.registry import resolve
from launcher.saves import short_of_time
from launcher.state import RunState, StageState
from launcher.state_words import ENDED
from launcher.status import read_status
from launcher.sweep import find as find_sweep
from launcher.sweep import resolve_one
from launcher.taking_over import left_elsewhere, taken_over
from launcher.wording import what_next
from vqscale.arguments import refuse_both
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json
from vqscale.stages import TRAINED


def cancel(arguments: argparse.Namespace) -> int:
    """Stop a run, or all runs of a sweep, and wait until nothing of it is left."""
    found = find_sweep(arguments.run)
    if found:
        return cancel_sweep(*found, arguments.json)
    layout = resolve(arguments.run)
    with alone(layout.root):
        before = read_status(layout)
        if before.state in ENDED and not before.alive:
            raise UserError(f"is {before.state} already", where=before.id, mend="there is nothing to cancel")
        _backend(layout).cancel(layout)
    now = read_status(layout)
    hint = f"; {words}" if (words := what_next(now)) else ""
    print(json.dumps(now.facts(), indent=2) if arguments.json else f"{now.id}: {now.words}{hint}")
    return 0


def trace(arguments: argparse.Namespace) -> int:
    """Ask a running training for a trace of its next steps."""
    layout = resolve_one(arguments.run)
    now = read_status(layout)
    running = [stage.stage for stage in now.stages if stage.state == "running" and stage.stage in TRAINED]
    stage = arguments.stage or next(iter(running), None)
    if stage not in running:
        what = f"stage '{arguments.stage}' is not a training that runs" if arguments.stage else "no training runs"
        raise UserError(what, where=now.id, mend=f"vqscale status {now.id} shows how it stands")
    if arguments.steps < 1:
        raise UserError(f"{arguments.steps} steps cannot be recorded", where="--steps", mend="use 1 or more")
    write_json(layout.trace_request(stage), {"steps": arguments.steps})
    facts = {"id": now.id, "stage": stage, "steps": arguments.steps, "folder": str(layout.traces(stage))}
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{now.id}: {stage} records {arguments.steps} steps behind its next log line")
    print(f"into       {layout.traces(stage)}/step-N.json.gz (open it at https://ui.perfetto.dev), a table beside it")
    return 0


def requeue(arguments: argparse.Namespace) -> int:
    """Start the supervisor of a run again, or what is left of a sweep."""
    refuse_both(arguments, "vqscale requeue", "--follow", "--json")
    found = find_sweep(arguments.run)
    if found:
        if arguments.stages or arguments.follow or arguments.on or arguments.overrides or arguments.take_over:
            what = "--stages, --on, --follow, --take-over and other resources are for one run"
            raise UserError(what, where=found[1].id, mend="name one of its runs")
        return requeue_sweep(*found, arguments.json)
    layout = resolve(arguments.run)
    with alone(layout.root):
        unfinished = _go_on(layout, arguments)
    for warning in short_of_time([layout], read_json(layout.info)["profile"]["grace_s"]):
        print(f"warning: {warning}", file=sys.stderr)
    run = layout.id
    if arguments.json:
        print(json.dumps({"id": run, "path": str(layout.root), "stages": unfinished}, indent=2))
    else:
        watch = "" if arguments.follow else f"; vqscale status {run} --watch shows it"
        print(f"{run} goes on with {', '.join(unfinished)}{watch}")
    return follow_or_detach(layout) if arguments.follow else 0


def _go_on(layout: RunLayout, arguments: argparse.Namespace) -> list[str]:
    """Start what is left of a run that nobody runs; returns those stages."""
    before = read_status(layout)
    if before.alive:
        raise UserError("is running", where=before.id, mend=f"vqscale status {before.id} --watch shows it")
    lost = left_elsewhere(layout) if before.alive is None else None
    if before.alive is None and not (lost and arguments.take_over):
        mend = "requeue it there" + (", or if that machine is gone for good, add --take-over" if lost else "")
        raise UserError(f"cannot be gone on with from here: {before.note}", where=before.id, mend=mend)
    state = RunState.read(layout)
    if arguments.stages:
        _add_stages(layout, state, arguments.stages)
    if all(layout.done(stage).exists() for stage in state.stages):
        raise UserError("is done", where=before.id, mend="there is nothing to go on with; submit a new run")
    with taken_over(layout, lost) if lost else nullcontext() as unsure:
        if arguments.on or arguments.overrides:
            move(layout, arguments.on, arguments.overrides)
        state.reopen(layout)
        state.write(layout)
        _backend(layout).submit(layout)
    if unsure:
        print(f"warning: {unsure}", file=sys.stderr)
    return [name for name, stage in state.stages.items() if stage.state != "done"]


def _add_stages(layout: RunLayout, state: RunState, text: str) -> None:
    recipe = layout.read_recipe()
    wanted = {*state.stages, *select_stages(recipe, text, layout)}
    fresh = {name: StageState(tasks=recipe.resources.array_of(name)) for name in recipe.stages}
    state.stages = {name: state.stages.get(name, fresh[name]) for name in recipe.stages if name in wanted}


def _backend(layout: RunLayout) -> Backend:
    return backend_for(Profile.model_validate(read_json(layout.info)["profile"]))
