"""Commands that look at runs: status, show, logs, ls."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from launcher import registry
from launcher.listing import Choice, Row, choose
from launcher.logs import Line, LogChoice, print_logs
from launcher.registry import resolve
from launcher.show import page, page_facts
from launcher.state_words import GONE
from launcher.status import RunStatus, read_many, read_status, unreadable
from launcher.sweep import find as find_sweep
from launcher.sweep import resolve_one
from launcher.tables import console, view, view_many
from launcher.watch import EXIT_FAILED, follow, follow_many
from launcher.wording import what_next
from vqscale.arguments import refuse_both
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError

_NO_RUNS = "no runs yet; start one with `vqscale submit RECIPE` or `vqscale quickstart`"
_NONE_GOES_ON = "no run is going on; vqscale status shows all"
_NONE_FITS = "no run fits; vqscale ls shows all"


def status(arguments: argparse.Namespace) -> int:
    """Show how one run stands by stage, or several with a line for each.

    Returns 1 where runs that were named have been watched to their ends, and one of them is not done.
    """
    refuse_both(arguments, "vqscale status", "--watch", "--json")
    choice = _choice(arguments)
    if arguments.runs and choice != Choice():
        raise UserError("filters choose among all runs", where="vqscale status", mend="leave RUN or the filters out")
    named = [layout for text in arguments.runs for layout in _layouts(text)]
    if len(arguments.runs) == 1 and find_sweep(arguments.runs[0]) is None:
        return _status_of_one(named[0], arguments)
    runs = _Runs(named, choice)
    try:
        statuses = follow_many(runs.going_on) if arguments.watch else runs.read()
    except KeyboardInterrupt:
        return 0
    _print_many(statuses, arguments)
    if runs.gone and not arguments.json:
        print(f"gone: {runs.gone} more; vqscale ls --state gone lists them, vqscale ls --prune forgets them")
    return EXIT_FAILED if arguments.watch and named and any(one.state != "done" for one in statuses) else 0


def _layouts(text: str) -> list[RunLayout]:
    """The run that is meant, or the runs of the sweep."""
    found = find_sweep(text)
    return found[1].layouts(found[0]) if found else [resolve(text)]


@dataclass
class _Runs:
    """Runs that a command line names, or else chooses."""

    named: Sequence[RunLayout]
    choice: Choice
    gone: int = 0
    """How many of the chosen were gone when it was last tried."""
    _going: set[str] = field(default_factory=set)

    def read(self) -> list[RunStatus]:
        """How they stand now."""
        if self.named:
            pairs = zip(self.named, read_many(self.named), strict=True)
            return [_or_unreadable(layout, status) for layout, status in pairs]
        rows = self.choice.rows("current")
        found = [row.status for row in rows if row.status]
        self.gone = len(rows) - len(found)
        return found

    def going_on(self) -> list[RunStatus]:
        """The same; of the chosen without those that have always been over: they would push others off the screen."""
        found = self.read()
        self._going.update(one.id for one in found if not one.over)
        return [one for one in found if self.named or one.id in self._going]


def _or_unreadable(layout: RunLayout, status: RunStatus | UserError) -> RunStatus:
    if isinstance(status, RunStatus):
        return status
    return unreadable(layout.root.name, layout.root, 0.0, status)


def _status_of_one(layout: RunLayout, arguments: argparse.Namespace) -> int:
    if arguments.watch:
        try:
            now = follow(layout)
        except KeyboardInterrupt:
            return 0
        print(f"{now.id}: {now.words}{f'; {hint}' if (hint := what_next(now)) else ''}")
        return 0 if now.state == "done" else EXIT_FAILED
    now = read_status(layout)
    if arguments.json:
        print(json.dumps(now.facts(), indent=2))
    else:
        console().print(view(now))
        print(f"directory {now.path}")
        if hint := what_next(now):
            print(f"next      {hint}")
    return 0


def _print_many(statuses: Sequence[RunStatus], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps([status.facts() for status in statuses], indent=2))
    elif not statuses:
        print(_NO_RUNS if not registry.entries() else _NONE_GOES_ON if arguments.watch else _NONE_FITS)
    elif arguments.watch:
        print(*(f"{status.id}: {status.words}" for status in statuses), sep="\n")
    else:
        console().print(view_many(statuses))


def show(arguments: argparse.Namespace) -> int:
    """Print all that is known of a run on one page."""
    layout = resolve_one(arguments.run)
    print(json.dumps(page_facts(layout), indent=2) if arguments.json else page(layout))
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """Print or follow the logs of ranks."""
    if arguments.attempt is not None and arguments.attempt < 1:
        raise UserError(f"no attempt {arguments.attempt}", where="--attempt", mend="they are counted from 1")
    choice = LogChoice(arguments.stage, arguments.rank, arguments.failed, arguments.attempt, arguments.task)
    layout, say, told = resolve_one(arguments.run), _say_json if arguments.json else _say, False

    def say_one(line: Line) -> None:
        nonlocal told
        told = True
        say(line)

    try:
        print_logs(layout, choice, arguments.follow, say_one)
    except KeyboardInterrupt:
        return 0
    if not told:
        print(f"nothing has been written yet; vqscale status {layout.id} says what the run waits for", file=sys.stderr)
    return 0


def ls(arguments: argparse.Namespace) -> int:
    """List the runs that the filters leave, the oldest first; or forget those of them that are gone."""
    if arguments.prune:
        return _prune(_choice(arguments), arguments.json)
    rows = _choice(arguments).rows("none")
    if arguments.json:
        print(json.dumps([row.facts() for row in rows], indent=2))
    elif not rows:
        print(_NONE_FITS if registry.entries() else _NO_RUNS)
    else:
        width = max(len(row.entry.id) for row in rows)
        print(*(_line(row, width) for row in rows), sep="\n")
    return 0


def _prune(choice: Choice, as_json: bool) -> int:
    """Take out of the index what is not there any more; directories are not touched."""
    lost = [row.entry for row in choice.rows("none") if row.state == GONE]
    if choice == Choice():  # filters are of runs
        lost += [entry for entry in registry.everything() if entry.kind == "sweep"]
    lost = [entry for entry in lost if not entry.exists]
    for entry in lost:
        registry.drop(entry)
    if as_json:
        print(json.dumps([{"id": entry.id, "path": str(entry.path)} for entry in lost], indent=2))
    else:
        print(*([f"forgotten: {entry.id}  {entry.path}" for entry in lost] or ["nothing is gone"]), sep="\n")
    return 0


def _choice(arguments: argparse.Namespace) -> Choice:
    return choose(arguments.state, arguments.name, arguments.since, arguments.on, arguments.newest)


def _line(row: Row, width: int) -> str:
    created = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.entry.created))
    aside = f"  ({row.note})" if row.note else ""
    return f"{row.entry.id:{width}}  {created}  {row.state:<9}  {row.entry.path}{aside}"


def _say(line: Line) -> None:
    print(line.plain(), flush=True)


def _say_json(line: Line) -> None:
    print(json.dumps(line.facts(), ensure_ascii=False), flush=True)
