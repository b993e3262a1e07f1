"""Commands that start runs: quickstart, plan, submit."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from types import FrameType

from launcher.backends import Backend, backend_for
from launcher.commands import sweep
from launcher.locks import alone
from launcher.plan import Plan, make_plan
from launcher.registry import choose_directory
from launcher.report import print_report
from launcher.rundir import create, remove
from launcher.status import RunStatus
from launcher.watch import EXIT_FAILED, follow
from vqscale.arguments import refuse_both
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError

EXIT_INTERRUPTED = 130


def plan(arguments: argparse.Namespace) -> int:
    """Print what `submit` with the same arguments would run."""
    if arguments.sweep:
        return sweep.plan(arguments)
    _refuse_at_most(arguments)
    made = _plan(arguments)
    print(
        json.dumps(made.facts(), indent=2) if arguments.json else made.text(),
        end="\n" if arguments.json else "",
    )
    return 0


def submit(arguments: argparse.Namespace) -> int:
    """Make the run directory and start the run."""
    if arguments.sweep:
        return sweep.submit(arguments)
    _refuse_at_most(arguments)
    refuse_both(arguments, "vqscale submit", "--follow", "--json")
    refuse_both(arguments, "vqscale submit", "--follow", "--prepare-only")
    made = _plan(arguments)
    backend = backend_for(made.job.profile)
    if not arguments.prepare_only:
        backend.check(made.job)
    layout = create(made)
    if not arguments.prepare_only:
        _start(backend, layout)
    _announce(made, layout, arguments)
    return follow_or_detach(layout) if arguments.follow else 0


def quickstart(arguments: argparse.Namespace) -> int:
    """Run the packaged recipe `quickstart` to its end and print its report."""
    run = choose_directory("quickstart", arguments.run) if arguments.run else None
    made = make_plan("quickstart", overrides=arguments.overrides, run=run)
    layout = create(made)
    backend = backend_for(made.job.profile)
    _start(backend, layout)
    print(f"run {layout.id} in {layout.root}", flush=True)
    _warn(made)
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        status = follow(layout)
    except KeyboardInterrupt:
        print("cancelling", file=sys.stderr)
        backend.cancel(layout)
        return EXIT_INTERRUPTED
    return _conclude(layout, status)


def follow_or_detach(layout: RunLayout) -> int:
    """Show the progress of a run that goes on without us; Ctrl-C only ends the display."""
    try:
        status = follow(layout)
    except KeyboardInterrupt:
        run = layout.id
        print(f"\n{run} goes on; vqscale status {run} --watch shows it, vqscale cancel {run} ends it")
        return 0
    return _conclude(layout, status)


def _start(backend: Backend, layout: RunLayout) -> None:
    """Start a run that was just made. Where that fails nothing stays of it: the same command can be repeated."""
    try:
        with alone(layout.root):
            backend.submit(layout)
    except BaseException:
        if backend.poll(layout).alive is False:
            remove(layout.root)
        raise


def _refuse_at_most(arguments: argparse.Namespace) -> None:
    if arguments.at_most is not None:
        raise UserError("is for sweeps", where="--at-most", mend="add --sweep key=a,b,c")


def _plan(arguments: argparse.Namespace) -> Plan:
    run = choose_directory("", arguments.run) if arguments.run else None
    return make_plan(arguments.recipe, arguments.on, arguments.overrides, run=run, stages=arguments.stages)


def _conclude(layout: RunLayout, status: RunStatus) -> int:
    if status.state == "done":
        print_report(layout)
        return 0
    print(f"error: {status.message or status.words}; see vqscale logs {status.id} --failed", file=sys.stderr)
    return EXIT_FAILED


def _announce(made: Plan, layout: RunLayout, arguments: argparse.Namespace) -> None:
    run = layout.id
    if arguments.json:
        facts = {"id": run, "path": str(layout.root), "started": not arguments.prepare_only}
        print(json.dumps({**facts, "warnings": list(made.warnings)}, indent=2))
        return
    print(f"run        {run}{' (prepared, not started)' if arguments.prepare_only else ''}")
    print(f"directory  {layout.root}")
    print(f"stages     {', '.join(made.job.stages)}")
    _warn(made)
    if arguments.prepare_only:
        print(f"start it:  vqscale requeue {run}")
    elif not arguments.follow:
        print(f"watch it:  vqscale status {run} --watch")
        print(f"its logs:  vqscale logs {run} -f")
        print(f"pictures:  tensorboard --logdir {shlex.quote(str(layout.tensorboard))}")
        print(f"stop it:   vqscale cancel {run}")


def _warn(made: Plan) -> None:
    for warning in made.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
