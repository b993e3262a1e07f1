"""The command drill: faults on purpose, and a table of what became of them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from launcher.drill import Drill, Kill, Outcome, random_kills, shortened, standard_faults
from launcher.sweep import resolve_one
from vqscale.config.load import load_recipe
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.faults import Fault, parse_faults

if TYPE_CHECKING:
    from rich.table import Table

EXIT_DIFFERS = 1
"""Exit code when a result is not what it has to be."""


def drill(arguments: argparse.Namespace) -> int:
    """Repeat a stage undisturbed, then under each fault."""
    run = resolve_one(arguments.run)
    overrides = shortened(run.read_recipe(), arguments.stage, arguments.overrides)
    recipe = load_recipe(run.recipe, overrides)
    faults = _faults(arguments, recipe)
    trial = Drill(run, recipe, arguments.stage)
    outcomes = [trial.undisturbed()]
    _say(outcomes[0], 0, 0)
    if arguments.random is not None:
        faults = random_kills(recipe, arguments.stage, arguments.random, arguments.seed, trial.seconds)
    for number, fault in enumerate(faults, 1):
        outcomes.append(trial.under(fault, number))
        _say(outcomes[-1], number, len(faults))
    bad = [outcome for outcome in outcomes if not outcome.good]
    if arguments.json:
        print(json.dumps([outcome.facts() for outcome in outcomes], indent=2))
    else:
        _print(outcomes)
        print(f"{len(bad)} of {len(faults)} went wrong" + (f"; see {run.root / 'drill'}" if bad else ""))
    return EXIT_DIFFERS if bad else 0


def _faults(arguments: argparse.Namespace, recipe: Recipe) -> list[Fault | Kill]:
    """What is asked for, all of it checked; none where it is left to chance, which needs to know how long it takes."""
    if arguments.random is not None:
        if arguments.random < 1:
            raise UserError(f"{arguments.random} kills", where="--random", mend="ask for one or more")
        return []
    if arguments.faults:
        try:
            return [*parse_faults(arguments.faults)]
        except UserError as error:
            raise UserError(error.what, where="--faults", mend=error.mend) from None
    if arguments.stage == "extract":
        raise UserError("has no steps for faults", where="--stage extract", mend="use --random N")
    return [*standard_faults(recipe, arguments.stage)]


def _say(outcome: Outcome, number: int, of: int) -> None:
    """Progress goes to standard error: a drill takes minutes, and `--json` must stay JSON."""
    head = f"{number}/{of} " if of else ""
    print(f"{head}{outcome.fault}: {outcome.result} ({outcome.seconds:.0f} s)", file=sys.stderr, flush=True)


def _print(outcomes: list[Outcome]) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(_table(outcomes))


def _table(outcomes: list[Outcome]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("fault", "starts", "resumed from", "seconds", "result"):
        table.add_column(name, justify="right" if name in ("starts", "seconds") else "left")
    for outcome in outcomes:
        resumed = ", ".join(map(str, outcome.resumed))
        style = "green" if outcome.good else "bold red"
        result = f"[{style}]{escape(outcome.result)}[/]"
        table.add_row(escape(outcome.fault), str(outcome.starts), resumed, f"{outcome.seconds:.0f}", result)
    return table
