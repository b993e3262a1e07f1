"""Starts and stops the runs of a sweep.

A queue takes all of them at once and lets each wait for an earlier one. Elsewhere `python -m launcher.sweeper SWEEP`
stays in the background and starts the next one whenever one is over.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cluster.profile import Profile
from launcher import family, process
from launcher.backends import Backend, backend_for
from launcher.backends.base import SOURCE, Queue
from launcher.state import RunState
from launcher.status import read_status
from launcher.sweep import Sweep
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json

_POLL_S = 1.0


def go_on(folder: Path, sweep: Sweep) -> list[str]:
    """Start what of a sweep is neither done nor on its way; returns the ids of those runs.

    Raises:
        UserError: there is nothing to go on with.
    """
    if sweep.runner and process.is_alive(sweep.runner):
        raise UserError("is on its way", where=sweep.id, mend=f"vqscale status --name '{sweep.id}.*' shows it")
    statuses = [(layout, read_status(layout, depth="none")) for layout in sweep.layouts(folder)]
    left = [layout for layout, status in statuses if status.state != "done" and status.alive is False]
    if not left:
        raise UserError("has no run to go on with", where=sweep.id, mend="submit a new sweep")
    for layout in left:
        state = RunState.read(layout)
        state.reopen(layout)
        state.write(layout)
    sweep.cancelled = False
    start(folder, sweep, left)
    return [layout.id for layout in left]


def start(folder: Path, sweep: Sweep, layouts: Sequence[RunLayout]) -> None:
    """Start runs of a sweep that wait; returns at once."""
    backend = _backend(layouts[0])
    if isinstance(backend, Queue):
        try:
            for number, layout in enumerate(layouts):
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


def cancel(folder: Path, sweep: Sweep) -> list[str]:
    """Stop all runs of a sweep, those that have not begun too; returns the ids of those that were stopped."""
    sweep.cancelled = True
    sweep.write(folder)
    return _cancel_all(reversed(sweep.layouts(folder)))


def _cancel_all(layouts: Iterable[RunLayout]) -> list[str]:
    stopped = []
    for layout in layouts:
        status = read_status(layout, depth="none")
        if status.alive or status.state in ("waiting", "running"):
            _backend(layout).cancel(layout)
            stopped.append(status.id)
    return stopped


def run(folder: Path) -> int:
    """Start the runs one after the other, as many at a time as the sweep says; those that others started are left."""
    sweep = _read(folder)
    layouts = sweep.layouts(folder)
    waiting = [layout for layout in layouts if read_status(layout, depth="none").state == "waiting"]
    running: list[RunLayout] = []
    while waiting or running:
        sweep = _read(folder)
        ended = [layout for layout in running if read_status(layout, depth="none").over]
        running = [layout for layout in running if layout not in ended]
        if sweep.cancelled:
            return 1
        for layout in _free(sweep, waiting, running):
            waiting.remove(layout)
            if read_status(layout, depth="none").state == "waiting":
                _backend(layout).submit(layout)
                running.append(layout)
        if ended:
            family.write_comparison(folder)
        time.sleep(_POLL_S)
    return 0 if all(read_status(layout, depth="none").state == "done" for layout in layouts) else 1


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
    return run(parser.parse_args().folder)


if __name__ == "__main__":
    sys.exit(main())
