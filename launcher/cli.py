"""`vqscale`: the command line. Light on purpose: what a command needs is imported when it runs.

Every command's options stand here, its work in `launcher.commands`. Bad input, wrong options included, ends
with one line on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from launcher.state_words import STATES
from vqscale.arguments import RUN_HELP, OneLineParser, choose_command, either, examples
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.stages import DRILLED, STAGES, TRAINED
from vqscale.version import __version__

_HEAD = "Train discrete image models at scale: VQ-VAE-2 tokenizers and priors over their codes."
_START = "Start here: vqscale quickstart"


def build_parser() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """The parser of `vqscale`, and those of its commands by name."""
    parser = OneLineParser(prog="vqscale", description=_HEAD, epilog=_START)
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    made: dict[str, OneLineParser] = {}

    def add(name: str, handler: str, text: str, example: str) -> OneLineParser:
        command: OneLineParser = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=examples(example),
        )
        command.set_defaults(handler=handler)
        made[name] = command
        return command

    _add_start(add)
    _add_watch(add)
    _add_control(add)
    _add_other(add)
    return parser, made


_READ_ELSEWHERE = ("data", "codes", "sample", "evaluate", "export", "bench", "checkpoints")
"""Commands whose options, --help included, are read by what stands behind them."""

_RUNS_HELP = f"{RUN_HELP}; or folder or id of a sweep"
_STAGES = ", ".join(STAGES)

Add = Callable[[str, str, str, str], OneLineParser]


def _add_start(add: Add) -> None:
    quickstart = add(
        "quickstart",
        "start:quickstart",
        "run the whole pipeline on generated clock faces, on this machine",
        "vqscale quickstart tokenizer.training.steps=200",
    )
    _directory(quickstart)
    _overrides(quickstart)
    plan = add(
        "plan",
        "start:plan",
        "print what submit would run: resolved recipe, commands, environment, warnings",
        "vqscale plan cifar10 resources.processes=4",
    )
    _recipe(plan)
    _json(plan)
    submit = add(
        "submit",
        "start:submit",
        "start a run and return at once",
        "vqscale submit my.yaml --follow prior.training.steps=5000",
    )
    _recipe(submit)
    submit.add_argument("--follow", action="store_true", help="show the progress; Ctrl-C leaves the run going")
    submit.add_argument("--prepare-only", action="store_true", help="make the run directory, start nothing")
    _json(submit)
    family = add(
        "family",
        "family:family",
        "train a list of models on as many images each, and compare them on a page",
        "vqscale family clocks --follow",
    )
    where = "YAML file, name of a list that comes with vqscale, or folder or id of a family to go on with"
    family.add_argument("list", metavar="LIST", help=where)
    family.add_argument("--members", metavar="A,B", help="only these members")
    family.add_argument("--on", default="local", metavar="PROFILE", help="machine to run on (default: local)")
    place = "folder of the family (default: family-NAME-TIME in $VQSCALE_RUNS or ./runs)"
    family.add_argument("--out", metavar="DIR", help=place)
    family.add_argument("--at-most", type=int, metavar="N", help="runs at a time (default: all in a queue, else 1)")
    what = family.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print the members and what they share; make nothing")
    what.add_argument("--prepare-only", action="store_true", help="make the run directories, start nothing")
    what.add_argument("--page", action="store_true", help="compare what a family has come to so far; start nothing")
    what.add_argument("--follow", action="store_true", help="show the progress; Ctrl-C leaves the runs going")
    _json(family)
    settings = "settings of the list, such as budget.prior=64000, or of all members' recipes, such as seed=7"
    family.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=settings)


def _add_watch(add: Add) -> None:
    status = add(
        "status",
        "watch:status",
        "show how runs stand: one by stage, several (all if none is named) a line each",
        "vqscale status latest --watch",
    )
    status.add_argument("runs", nargs="*", default=[], metavar="RUN", help=_RUNS_HELP)
    status.add_argument("--watch", action="store_true", help="show the progress until all of them are over")
    _filters(status)
    _json(status)
    show = add(
        "show",
        "watch:show",
        "print all that is known of a run: recipe, code, attempts, checkpoints, report",
        "vqscale show latest",
    )
    _run(show)
    _json(show)
    logs = add(
        "logs",
        "watch:logs",
        "print the logs of a run's ranks, merged by time and marked",
        "vqscale logs latest --failed",
    )
    _run(logs)
    logs.add_argument("--stage", metavar="STAGE", help=f"one of {_STAGES} (default: the one that runs or failed)")
    logs.add_argument("--attempt", type=int, metavar="N", help="attempt of the stage (default: the newest)")
    logs.add_argument("--task", type=int, metavar="N", help="task of a stage that is an array (default: all)")
    which = logs.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="one rank only")
    which.add_argument("--failed", action="store_true", help="only ranks that failed")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    logs.add_argument("--json", action="store_true", help="print each line as JSON, with its rank and time")
    listing = add("ls", "watch:ls", "list the runs of this user", "vqscale ls --state running,failed --since 2d")
    prune = "forget those whose directories are gone, and list these"
    listing.add_argument("--prune", action="store_true", help=prune)
    _filters(listing)
    _json(listing)


def _add_control(add: Add) -> None:
    cancel = add(
        "cancel",
        "control:cancel",
        "stop a run, or all runs of a sweep; none of their processes is left",
        "vqscale cancel latest",
    )
    _run(cancel, _RUNS_HELP)
    _json(cancel)
    trace = add(
        "trace",
        "control:trace",
        "record what some steps of a training spend their time on, while it goes on",
        "vqscale trace latest --steps 5",
    )
    _run(trace)
    trace.add_argument("--stage", metavar="STAGE", help=f"{either(TRAINED)} (default: the one that runs)")
    trace.add_argument("--steps", type=int, default=3, metavar="N", help="steps to record (default: 3)")
    _json(trace)
    requeue = add(
        "requeue",
        "control:requeue",
        "go on with a run that stopped, or what is left of a sweep: at the first unfinished stage, from its last "
        "checkpoint; here or elsewhere",
        "vqscale requeue latest --on slurm-gpu resources.processes=8",
    )
    _run(requeue, _RUNS_HELP)
    requeue.add_argument("--stages", metavar="A,B", help=f"add stages that the run did not have: {_STAGES}")
    requeue.add_argument("--on", metavar="PROFILE", help="machine to go on with (default: the one that it had)")
    requeue.add_argument(
        "--take-over", action="store_true", help="even if its supervisor was on another machine, which is gone for good"
    )
    requeue.add_argument("--follow", action="store_true", help="show the progress; Ctrl-C leaves the run going")
    requeue.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="other resources, such as resources.processes=4"
    )
    _json(requeue)


def _add_other(add: Add) -> None:
    doctor = add(
        "doctor",
        "doctor:doctor",
        "check the machines before hours are spent: this one, and by a short job the nodes",
        "vqscale doctor --on my-cluster.yaml --nodes 4 --shards s3://bucket/shards/train",
    )
    doctor.add_argument("--on", default="local", metavar="PROFILE", help="machines to check (default: local)")
    doctor.add_argument("--nodes", type=int, metavar="N", help="nodes to ask (default: those of a stage, at least 2)")
    doctor.add_argument("--shards", metavar="URL", help="folder of shards, or one shard, that the nodes read")
    doctor.add_argument(
        "--wait", type=int, default=600, metavar="SECONDS", help="for nodes that are busy (default: 600)"
    )
    _json(doctor)
    cluster = add(
        "cluster",
        "cluster:cluster",
        "run a throw-away Slurm of several nodes on this machine, to try things out",
        "vqscale cluster up --nodes 3",
    )
    cluster.add_argument("action", choices=("up", "down", "status"), help="start it, end it, show how it stands")
    cluster.add_argument("--nodes", type=int, default=3, metavar="N", help="nodes to start (default: 3)")
    cluster.add_argument("--hosts", action="store_true", help="nodes with addresses of their own (root only)")
    cluster.add_argument("--dir", metavar="DIR", help="folder of all its files (default: in $VQSCALE_HOME)")
    cluster.add_argument("--conf", action="store_true", help="print the path of slurm.conf alone (status)")
    data = add(
        "data",
        "other:data",
        "pack, index, verify and show image shards (vqscale data --help)",
        "vqscale data pack photos/ shards/ --size 64",
    )
    data.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    codes = add(
        "codes",
        "other:codes",
        "pull, push, verify and show code shards (vqscale codes --help)",
        "vqscale codes pull s3://bucket/codes codes --fraction 0.1",
    )
    codes.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    sample = add(
        "sample",
        "other:sample",
        "draw images from a finished run, complete images, redraw details (vqscale sample --help)",
        "vqscale sample latest --classes 3,7 --count 64",
    )
    sample.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    drill = add(
        "drill",
        "drill:drill",
        "repeat a stage of a run under faults and compare the results with the undisturbed one's",
        "vqscale drill latest --stage tokenizer --random 10 resources.strategy=fsdp2",
    )
    _run(drill)
    drill.add_argument("--stage", default="tokenizer", metavar="STAGE", help=f"{either(DRILLED)} (default: tokenizer)")
    faults = drill.add_mutually_exclusive_group()
    faults.add_argument(
        "--faults", metavar="LIST", help="such as 'kill:step=5; slow:step=7,rank=1' (default: one of each)"
    )
    faults.add_argument("--random", type=int, metavar="N", help="N kills at random moments instead")
    drill.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments (default: 0)")
    _overrides(drill)
    _json(drill)
    evaluate = add(
        "evaluate",
        "other:evaluate",
        "measure a finished run again, with other settings (vqscale evaluate --help)",
        "vqscale evaluate latest evaluate.features=inception-2015-12-05.pt",
    )
    evaluate.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    export = add(
        "export",
        "other:export",
        "write a run's models as safetensors, with a config and a model card (vqscale export --help)",
        "vqscale export latest exported",
    )
    export.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    bench = add(
        "bench",
        "other:bench",
        "measure throughput against peers and against what is possible (vqscale bench --help)",
        "vqscale bench loader --data photos.tar",
    )
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    checkpoints = add(
        "checkpoints",
        "checkpoints:checkpoints",
        "list, verify and prune the checkpoints of a run (vqscale checkpoints --help)",
        "vqscale checkpoints ls latest",
    )
    checkpoints.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    add("schema", "other:schema", "print the JSON Schema of recipes", "vqscale schema > recipe.schema.json")


def _run(parser: OneLineParser, text: str = RUN_HELP) -> None:
    parser.add_argument("run", metavar="RUN", help=text)


def _filters(parser: OneLineParser) -> None:
    parser.add_argument("--state", metavar="A,B", help=f"only runs in these states: {', '.join(STATES)}")
    parser.add_argument("--name", metavar="GLOB", help="only runs whose id fits, such as 'cifar10-*'")
    parser.add_argument("--since", metavar="WHEN", help="only runs made since: 30m, 12h, 2d, 1w ago, or 2026-01-31")
    parser.add_argument("--on", metavar="PROFILE", help="only runs on this profile")
    parser.add_argument("-n", "--newest", type=int, metavar="N", help="only the newest N of them")


def _recipe(parser: OneLineParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a recipe that comes with vqscale")
    parser.add_argument("--on", default="local", metavar="PROFILE", help="machine to run on (default: local)")
    parser.add_argument("--stages", metavar="A,B", help=f"only these stages: {_STAGES} (default: all)")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="key=a,b",
        help="a run for each value; given again, for each combination",
    )
    parser.add_argument(
        "--at-most", type=int, metavar="N", help="runs of a sweep at the same time (default: all in a queue, else 1)"
    )
    _directory(parser)
    _overrides(parser)


def _directory(parser: OneLineParser) -> None:
    parser.add_argument("--run", metavar="DIR", help="run directory (default: NAME-TIME in $VQSCALE_RUNS or ./runs)")


def _overrides(parser: OneLineParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings of the recipe, such as seed=7"
    )


def _json(parser: OneLineParser) -> None:
    parser.add_argument("--json", action="store_true", help="print facts as JSON")


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
