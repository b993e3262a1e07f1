"""`vqscale checkpoints`: which a run has, whether they are whole, and fewer of them; without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from launcher.sweep import resolve_one
from vqscale.arguments import RUN_HELP, OneLineParser, choose_command, did_you_mean, either, examples
from vqscale.checkpoint import folder
from vqscale.checkpoint.manifest import FaultError
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.masking import shown
from vqscale.stages import TRAINED

EXIT_FAULTS = 1
"""Exit code of `verify` when a checkpoint is damaged, and of `prune` when a stage has no valid one."""


_EXAMPLES = {
    "ls": ("latest",),
    "verify": ("latest --stage tokenizer",),
    "prune": ("latest --keep 1 --dry-run",),
}


def checkpoints(arguments: argparse.Namespace) -> int:
    """Run one of the commands."""
    parser, commands = _parsers()
    words: Sequence[str] = arguments.arguments
    options = commands[choose_command(parser, commands, words)].parse(words[1:])
    return int(options.run_command(options, resolve_one(options.run)))


def ls(options: argparse.Namespace, layout: RunLayout) -> int:
    """List the checkpoints of a run, the newest first, by their manifests; `verify` reads the files too."""
    found = [_entry(where, stage, step) for stage, where in _places(options, layout) for step in folder.steps(where)]
    if options.json:
        _print_json(found)
    else:
        print(*map(_line, found), sep="\n") if found else print(f"{layout.root}: no checkpoints")
    return 0


def verify(options: argparse.Namespace, layout: RunLayout) -> int:
    """Read every checkpoint and compare it with its manifest; exit code 1 when one is damaged."""
    found = []
    for stage, where in _places(options, layout):
        for step in folder.steps(where):
            found.append({"stage": stage, "step": step, "fault": folder.find_fault(where, step)})
            if not options.json:
                print(f"{stage} step {step}: {found[-1]['fault'] or 'is as its manifest says'}", flush=True)
    if not found:
        raise UserError("has no checkpoints", where=str(layout.root), mend="its first one comes after checkpoint_every")
    if options.json:
        _print_json(found)
    return EXIT_FAULTS if any(one["fault"] for one in found) else 0


def prune(options: argparse.Namespace, layout: RunLayout) -> int:
    """Keep the newest N valid checkpoints of each stage and remove what is older.

    The newest valid one always stays. Where none is valid, nothing is removed, and the exit code is 1.
    """
    if options.keep < 1:
        raise UserError(f"keeps {options.keep} checkpoints", where="--keep", mend="keep 1 or more")
    result = {}
    for stage, where in _places(options, layout):
        planned = folder.plan_pruning(where, options.keep)
        for step in planned.removed if not options.dry_run else []:
            folder.remove(where, step)
        if planned.kept or planned.faults:
            result[stage] = planned
    if options.json:
        _print_json({stage: vars(planned) | {"dry_run": options.dry_run} for stage, planned in result.items()})
    else:
        print(*_pruned_lines(result, options.dry_run), sep="\n")
    return 0 if all(planned.kept for planned in result.values()) else EXIT_FAULTS


def _pruned_lines(result: dict[str, folder.Pruning], dry_run: bool) -> Iterator[str]:
    for stage, planned in result.items():
        for step, fault in planned.faults.items():
            yield f"{stage} step {step}: {fault}"
        for step in planned.removed:
            yield f"{stage} step {step}: {'would be removed' if dry_run else 'removed'}"
        kept = ", ".join(map(str, planned.kept))
        yield f"{stage}: keeps step {kept}" if kept else f"{stage}: none is valid, so nothing is removed"
    if not result:
        yield "no checkpoints"


def _places(options: argparse.Namespace, layout: RunLayout) -> list[tuple[str, str]]:
    """Stage and place of its checkpoints, of the stages that are asked for."""
    recipe = layout.read_recipe()
    if options.stage and options.stage not in TRAINED:
        mend = f"{did_you_mean(options.stage, TRAINED)}{' or '.join(TRAINED)}"
        raise UserError(f"no stage '{options.stage}' has checkpoints", where="--stage", mend=mend)
    return [(stage, layout.checkpoints(recipe, stage)) for stage in TRAINED if options.stage in (None, stage)]


def _entry(where: str, stage: str, step: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"stage": stage, "step": step, "url": shown(folder.step_url(where, step))}
    try:
        manifest = folder.open_stored(where, step).manifest
    except FaultError as fault:
        return entry | {"fault": str(fault)}
    facts = {"bytes": manifest.size, "tensors": len(manifest.tensors), "world": manifest.world}
    return entry | facts | {"strategy": manifest.strategy, "made_by": manifest.made_by, "fault": None}


def _line(entry: dict[str, Any]) -> str:
    head = f"{entry['stage']:<10} step {entry['step']:>8}"
    if entry["fault"]:
        return f"{head}  damaged: {entry['fault']}"
    by = f"{entry['world']} ranks, {entry['strategy']}"
    return f"{head}  {entry['bytes'] / 1e6:>10,.1f} MB  {entry['tensors']:>5} tensors  {by}  {entry['url']}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _parsers() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    parser = OneLineParser(prog="vqscale checkpoints", description="List, verify and remove the checkpoints of a run.")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for run_command, text in ((ls, "list them"), (verify, "compare them with their manifests"), (prune, "keep a few")):
        command = commands.add_parser(run_command.__name__, help=text, description=run_command.__doc__)
        name = run_command.__name__
        command.epilog = examples(*(f"vqscale checkpoints {name} {words}" for words in _EXAMPLES[name]))
        command.add_argument("run", metavar="RUN", help=RUN_HELP)
        command.add_argument("--stage", metavar="STAGE", help=f"only of the stage {either(TRAINED)} (default: of both)")
        command.add_argument("--json", action="store_true", help="print facts as JSON")
        command.set_defaults(run_command=run_command)
    prune_parser = commands.choices["prune"]
    prune_parser.add_argument("--keep", type=int, required=True, metavar="N", help="checkpoints to keep of each stage")
    prune_parser.add_argument("--dry-run", action="store_true", help="say what would be removed")
    return parser, dict(commands.choices)
