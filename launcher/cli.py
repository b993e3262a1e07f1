"""`vqscale`: the command line. Light on purpose: what a command needs is imported when it runs.

Every command is a row of `COMMANDS`; its options are in `launcher.options`, its work in `launcher.commands`. Bad input,
wrong options included, ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from launcher import options
from vqscale.arguments import OneLineParser, choose_command, examples
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.version import __version__

_HEAD = "Train discrete image models at scale: VQ-VAE-2 tokenizers and priors over their codes."
_START = "Start here: vqscale quickstart"


class Command(NamedTuple):
    """A command as the command line knows it."""

    name: str
    handler: str
    """MODULE:FUNCTION of `launcher.commands`."""
    text: str
    """What it does: the line in the list of commands, and the head of its help."""
    example: str
    options: tuple[Callable[[OneLineParser], None], ...] = ()
    """What adds them, in the order of the help."""


COMMANDS = (
    Command(
        "quickstart",
        "start:quickstart",
        "run the whole pipeline on generated clock faces, on this machine",
        "vqscale quickstart tokenizer.training.steps=200",
        (options.directory, options.overrides),
    ),
    Command(
        "plan",
        "start:plan",
        "print what submit would run: resolved recipe, commands, environment, warnings",
        "vqscale plan cifar10 resources.processes=4",
        (options.recipe, options.as_json),
    ),
    Command(
        "submit",
        "start:submit",
        "start a run and return at once",
        "vqscale submit my.yaml --follow prior.training.steps=5000",
        (options.recipe, options.submit, options.as_json),
    ),
    Command(
        "family",
        "family:family",
        "train a list of models on as many images each, and compare them on a page",
        "vqscale family clocks --follow",
        (options.family,),
    ),
    Command(
        "status",
        "watch:status",
        "show how runs stand: one by stage, several (all if none is named) a line each",
        "vqscale status latest --watch",
        (options.runs, options.status, options.filters, options.as_json),
    ),
    Command(
        "show",
        "watch:show",
        "print all that is known of a run: recipe, code, attempts, checkpoints, report",
        "vqscale show latest",
        (options.run, options.as_json),
    ),
    Command(
        "logs",
        "watch:logs",
        "print the logs of a run's ranks, merged by time and marked",
        "vqscale logs latest --failed",
        (options.run, options.logs),
    ),
    Command(
        "ls",
        "watch:ls",
        "list the runs of this user",
        "vqscale ls --state running,failed --since 2d",
        (options.prune, options.filters, options.as_json),
    ),
    Command(
        "cancel",
        "control:cancel",
        "stop a run, or all runs of a sweep; none of their processes is left",
        "vqscale cancel latest",
        (options.run_or_sweep, options.as_json),
    ),
    Command(
        "trace",
        "control:trace",
        "record what some steps of a training spend their time on, while it goes on",
        "vqscale trace latest --steps 5",
        (options.run, options.trace, options.as_json),
    ),
    Command(
        "requeue",
        "control:requeue",
        "go on with a run that stopped, or what is left of a sweep: at the first unfinished stage, from its last "
        "checkpoint; here or elsewhere",
        "vqscale requeue latest --on slurm-gpu resources.processes=8",
        (options.run_or_sweep, options.requeue, options.as_json),
    ),
    Command(
        "doctor",
        "doctor:doctor",
        "check the machines before hours are spent: this one, and by a short job the nodes",
        "vqscale doctor --on my-cluster.yaml --nodes 4 --shards s3://bucket/shards/train",
        (options.doctor, options.as_json),
    ),
    Command(
        "cluster",
        "cluster:cluster",
        "run a throw-away Slurm of several nodes on this machine, to try things out",
        "vqscale cluster up --nodes 3",
        (options.cluster,),
    ),
    Command(
        "data",
        "other:data",
        "pack, index, verify and show image shards (vqscale data --help)",
        "vqscale data pack photos/ shards/ --size 64",
        (options.read_elsewhere,),
    ),
    Command(
        "codes",
        "other:codes",
        "pull, push, verify and show code shards (vqscale codes --help)",
        "vqscale codes pull s3://bucket/codes codes --fraction 0.1",
        (options.read_elsewhere,),
    ),
    Command(
        "sample",
        "other:sample",
        "draw images from a finished run, complete images, redraw details (vqscale sample --help)",
        "vqscale sample latest --classes 3,7 --count 64",
        (options.read_elsewhere,),
    ),
    Command(
        "drill",
        "drill:drill",
        "repeat a stage of a run under faults and compare the results with the undisturbed one's",
        "vqscale drill latest --stage tokenizer --random 10 resources.strategy=fsdp2",
        (options.run, options.drill, options.overrides, options.as_json),
    ),
    Command(
        "evaluate",
        "other:evaluate",
        "measure a finished run again, with other settings (vqscale evaluate --help)",
        "vqscale evaluate latest evaluate.features=inception-2015-12-05.pt",
        (options.read_elsewhere,),
    ),
    Command(
        "export",
        "other:export",
        "write a run's models as safetensors, with a config and a model card (vqscale export --help)",
        "vqscale export latest exported",
        (options.read_elsewhere,),
    ),
    Command(
        "bench",
        "other:bench",
        "measure throughput against peers and against what is possible (vqscale bench --help)",
        "vqscale bench loader --data photos.tar",
        (options.read_elsewhere,),
    ),
    Command(
        "checkpoints",
        "checkpoints:checkpoints",
        "list, verify and prune the checkpoints of a run (vqscale checkpoints --help)",
        "vqscale checkpoints ls latest",
        (options.read_elsewhere,),
    ),
    Command(
        "schema",
        "other:schema",
        "print the JSON Schema of recipes",
        "vqscale schema > recipe.schema.json",
        (),
    ),
)


_READ_ELSEWHERE = tuple(command.name for command in COMMANDS if options.read_elsewhere in command.options)
"""Commands whose options, --help included, are read by what stands behind them."""


def build_parser() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """The parser of `vqscale`, and those of its commands by name."""
    parser = OneLineParser(prog="vqscale", description=_HEAD, epilog=_START)
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    made: dict[str, OneLineParser] = {}
    for name, handler, text, example, adders in COMMANDS:
        command: OneLineParser = commands.add_parser(name, help=text, description=text, epilog=examples(example))
        command.set_defaults(handler=handler)
        for add in adders:
            add(command)
        made[name] = command
    return parser, made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        UserError: unknown command or option; names the nearest.
    """
    parser, commands = build_parser()
    name = choose_command(parser, commands, argv)
    handler = commands[name].get_default("handler")
    if name in _READ_ELSEWHERE:
        return argparse.Namespace(handler=handler, arguments=list(argv[1:]))
    return commands[name].parse(argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vqscale`; returns the exit code."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        module, _, function = arguments.handler.partition(":")
        code: int = getattr(importlib.import_module(f"launcher.commands.{module}"), function)(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `vqscale logs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
