"""Commands that look at runs: status, logs, ls."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from launcher import registry
from launcher.logs import LogChoice, print_logs
from launcher.registry import resolve
from launcher.status import RunStatus, read_status
from launcher.watch import follow, view
from vqscale.errors import UserError


def status(arguments: argparse.Namespace) -> int:
    """Show how a run stands."""
    layout = resolve(arguments.run)
    if arguments.watch and not arguments.json:
        try:
            follow(layout)
        except KeyboardInterrupt:
            return 0
    now = read_status(layout)
    if arguments.json:
        print(json.dumps(now.facts(), indent=2))
    elif arguments.watch:
        print(f"{now.id}: {now.words}")
    else:
        _print_status(now)
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """Print or follow the logs of ranks."""
    choice = LogChoice(arguments.stage, arguments.rank, arguments.failed, arguments.attempt)
    try:
        print_logs(resolve(arguments.run), choice, arguments.follow, say=_say)
    except KeyboardInterrupt:
        return 0
    return 0


def ls(arguments: argparse.Namespace) -> int:
    """List all runs."""
    rows = [_row(entry) for entry in registry.entries()]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print("no runs yet; start one with `vqscale submit RECIPE` or `vqscale quickstart`")
    width = max((len(row["id"]) for row in rows), default=0)
    for row in rows:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        print(f"{row['id']:{width}}  {created}  {row['state']:<9}  {row['path']}{_aside(row['note'])}")
    return 0


def _row(entry: registry.Entry) -> dict[str, Any]:
    row = {"id": entry.id, "path": str(entry.path), "created": entry.created}
    if not entry.exists:
        return {**row, "state": "gone", "note": "its directory is not there"}
    try:
        now = read_status(resolve(str(entry.path)))
    except (UserError, KeyError, TypeError, ValueError) as error:
        return {**row, "state": "unreadable", "note": str(error)}
    return {**row, "state": now.state, "note": now.note}


def _aside(note: str) -> str:
    return f"  ({note})" if note else ""


def _print_status(now: RunStatus) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200  # a pipe has no width: do not cut the lines that somebody greps
    console.print(view(now))
    print(f"directory {now.path}")


def _say(line: str) -> None:
    print(line, flush=True)
