"""Starts and stops the runs of a sweep.

A queue takes all of them at once and lets each wait for an earlier one. Elsewhere `python -m launcher.sweeper SWEEP`
stays in the background and starts the next one whenever one is over.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.profile import Profile
from launcher import family, process
from launcher.backends import Backend, backend_for
from launcher.backends.base import SOURCE, Queue
from launcher.locks import alone
from launcher.rundir import remove
from launcher.state import RunState
from launcher.status import RunStatus, read_many, read_status
from launcher.sweep import Sweep
from vqscale.config.layout import RunLayout
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.files import read_json

_POLL_S = 1.0


@dataclass
class Outcome:
    """What was done with the runs of a sweep, each by itself."""

    runs: list[str] = field(default_factory=list)
    """Ids of those with which it was done."""
    faults: list[str] = field(default_factory=list)
    """A line for each with which it could not be done."""


def go_on(folder: Path, sweep: Sweep) -> Outcome:
    """Start what of a sweep is neither done nor on its way, as far as it can be read.

    Raises:
        UserError: there is nothing to go on with, or it could not be started.
    """
    with alone(folder):
        sweep = _read(folder)
        if sweep.runner and process.is_alive(sweep.runner):
            raise UserError("is on its way", where=sweep.id, mend=f"vqscale status {sweep.id} shows it")
        outcome, left = Outcome(), list[RunLayout]()
        for layout, status in _statuses(sweep.layouts(folder)):
            if isinstance(status, UserError):
                outcome.faults.append(str(status))
            elif status.state != "done" and status.alive is False:
                left.append(layout)
        if not left:
            mend = "; ".join(outcome.faults) or "submit a new sweep"
            raise UserError("has no run to go on with", where=sweep.id, mend=mend)
        for layout in left:
            with alone(layout.root):
                state = RunState.read(layout)
                state.reopen(layout)
                state.write(layout)
        sweep.cancelled = False
        start(folder, sweep, left)
        outcome.runs = [layout.id for layout in left]
        return outcome


def start(folder: Path, sweep: Sweep, layouts: Sequence[RunLayout]) -> None:
    """Start runs of a sweep that wait; returns at once. The caller holds the folder's lock."""
    backend = _backend(layouts[0])
    if isinstance(backend, Queue):
        sweep.write(folder)
        try:
            for number, layout in enumerate(layouts):
                with alone(layout.root):
                    backend.submit_after(layout, sweep.earlier(layouts, number))
        except BaseException:
            _cancel_all(layouts)
            raise
        return
    with (folder / "sweep.log").open("ab") as log:
        runner = subprocess.Popen(
            [sys.executable, "-m", "launcher.sweeper", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=SOURCE,
            start_new_session=True,
        )
    sweep.runner = process.identity(runner.pid)
    sweep.write(folder)


def discard(folder: Path, layouts: Sequence[RunLayout]) -> None:
    """Remove a sweep that was just made and could not be started, unless somebody still has to end a part of it."""
    if all(_backend(layout).poll(layout).alive is False for layout in layouts):
        for layout in layouts:
            remove(layout.root)
        remove(folder)


def cancel(folder: Path, sweep: Sweep) -> Outcome:
    """Stop all runs of a sweep, those that have not begun too."""
    with alone(folder):
        sweep = _read(folder)
        sweep.cancelled = True
        sweep.write(folder)
        return _cancel_all(reversed(sweep.layouts(folder)))


def _cancel_all(layouts: Iterable[RunLayout]) -> Outcome:
    """What cannot be read or ended does not keep the others from being ended."""
    outcome = Outcome()
    for layout in layouts:
        try:
            with alone(layout.root):
                status = read_status(layout, depth="none")
                if status.alive or status.state in ("waiting", "running"):
                    _backend(layout).cancel(layout)
                    outcome.runs.append(status.id)
        except UserError as error:
            outcome.faults.append(str(error))
    return outcome


def _statuses(layouts: Sequence[RunLayout]) -> list[tuple[RunLayout, RunStatus | UserError]]:
    return list(zip(layouts, read_many(layouts, depth="none"), strict=True))


def _having(layouts: Sequence[RunLayout], fits: Callable[[RunStatus], bool]) -> list[RunLayout]:
    """The runs whose status fits; one that cannot be read does not."""
    return [one for one, status in _statuses(layouts) if isinstance(status, RunStatus) and fits(status)]


def run(folder: Path) -> int:
    """Start the runs one after the other, as many at a time as the sweep says; those that others started are left."""
    sweep = _read(folder)
    layouts = sweep.layouts(folder)
    for _, status in _statuses(layouts):
        if isinstance(status, UserError):
            _log(f"left out: {status}")
    waiting = _having(layouts, lambda status: status.state == "waiting")
    running: list[RunLayout] = []
    while waiting or running:
        sweep = _read(folder)
        going = _having(running, lambda status: not status.over)
        ended, running = len(going) < len(running), going
        if sweep.cancelled:
            return 1
        for layout in _free(sweep, waiting, running):
            waiting.remove(layout)
            if _started(layout):
                running.append(layout)
        if ended:
            _compare(folder)
        time.sleep(_POLL_S)
    return 0 if len(_having(layouts, lambda status: status.state == "done")) == len(layouts) else 1


def _started(layout: RunLayout) -> bool:
    """Start a run if it still waits. What cannot be started does not keep the others from it."""
    try:
        with alone(layout.root):
            if read_status(layout, depth="none").state != "waiting":
                return False
            _backend(layout).submit(layout)
    except UserError as error:
        _log(f"not started: {error}")
        return False
    return True


def _compare(folder: Path) -> None:
    """The page of a family is made anew whenever a member is over; a page that fails ends nothing."""
    try:
        family.write_comparison(folder)
    except UserError as error:
        _log(f"warning: {error}")


def _log(line: str) -> None:
    print(line, flush=True)


def _free(sweep: Sweep, waiting: Sequence[RunLayout], running: Sequence[RunLayout]) -> list[RunLayout]:
    """Those of the waiting runs that may start now: as many as there is room for, and none before what it reads."""
    pending = {layout.root.name for layout in (*waiting, *running)}
    free = [layout for layout in waiting if sweep.after.get(layout.root.name) not in pending]
    return free[: max(0, sweep.at_most - len(running))]


def _read(folder: Path) -> Sweep:
    sweep = Sweep.read(folder)
    if sweep is None:
        raise UserError("holds no sweep", where=str(folder))
    return sweep


def _backend(layout: RunLayout) -> Backend:
    return backend_for(Profile.model_validate(read_json(layout.info)["profile"]))


def main() -> int:
    """Entry of `python -m launcher.sweeper`."""
    parser = argparse.ArgumentParser(prog="python -m launcher.sweeper", description=__doc__)
    parser.add_argument("folder", type=Path)
    try:
        return run(parser.parse_args().folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
