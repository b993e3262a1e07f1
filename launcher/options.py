"""The options of every command of `vqscale`: a function for each command, and those that several have.

Light on purpose, as the command line is. `launcher.cli` says which command has which.
"""

from __future__ import annotations

import argparse

from launcher.state_words import STATES
from vqscale.arguments import RUN_HELP, OneLineParser, either
from vqscale.stages import DRILLED, STAGES, TRAINED

_RUNS_HELP = f"{RUN_HELP}; or folder or id of a sweep"
_STAGES = ", ".join(STAGES)


def run(parser: OneLineParser, text: str = RUN_HELP) -> None:
    """A run."""
    parser.add_argument("run", metavar="RUN", help=text)


def run_or_sweep(parser: OneLineParser) -> None:
    """A run, or all of a sweep."""
    run(parser, _RUNS_HELP)


def runs(parser: OneLineParser) -> None:
    """Any number of runs or sweeps."""
    parser.add_argument("runs", nargs="*", default=[], metavar="RUN", help=_RUNS_HELP)


def filters(parser: OneLineParser) -> None:
    """Which runs are listed."""
    parser.add_argument("--state", metavar="A,B", help=f"only runs in these states: {', '.join(STATES)}")
    parser.add_argument("--name", metavar="GLOB", help="only runs whose id fits, such as 'cifar10-*'")
    parser.add_argument("--since", metavar="WHEN", help="only runs made since: 30m, 12h, 2d, 1w ago, or 2026-01-31")
    parser.add_argument("--on", metavar="PROFILE", help="only runs on this profile")
    parser.add_argument("-n", "--newest", type=int, metavar="N", help="only the newest N of them")


def recipe(parser: OneLineParser) -> None:
    """What is run, where, and how often."""
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
    directory(parser)
    overrides(parser)


def directory(parser: OneLineParser) -> None:
    """Where a run's files go."""
    parser.add_argument("--run", metavar="DIR", help="run directory (default: NAME-TIME in $VQSCALE_RUNS or ./runs)")


def overrides(parser: OneLineParser) -> None:
    """Settings of the recipe."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings of the recipe, such as seed=7"
    )


def as_json(parser: OneLineParser) -> None:
    """Facts instead of sentences."""
    parser.add_argument("--json", action="store_true", help="print facts as JSON")


def submit(parser: OneLineParser) -> None:
    """How `submit` starts a run."""
    parser.add_argument("--follow", action="store_true", help="show the progress; Ctrl-C leaves the run going")
    parser.add_argument("--prepare-only", action="store_true", help="make the run directory, start nothing")


def family(parser: OneLineParser) -> None:
    """A list of models, and what is done with it."""
    where = "YAML file, name of a list that comes with vqscale, or folder or id of a family to go on with"
    parser.add_argument("list", metavar="LIST", help=where)
    parser.add_argument("--members", metavar="A,B", help="only these members")
    parser.add_argument("--on", default="local", metavar="PROFILE", help="machine to run on (default: local)")
    place = "folder of the family (default: family-NAME-TIME in $VQSCALE_RUNS or ./runs)"
    parser.add_argument("--out", metavar="DIR", help=place)
    parser.add_argument("--at-most", type=int, metavar="N", help="runs at a time (default: all in a queue, else 1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print the members and what they share; make nothing")
    what.add_argument("--prepare-only", action="store_true", help="make the run directories, start nothing")
    what.add_argument("--page", action="store_true", help="compare what a family has come to so far; start nothing")
    what.add_argument("--follow", action="store_true", help="show the progress; Ctrl-C leaves the runs going")
    as_json(parser)
    settings = "settings of the list, such as budget.prior=64000, or of all members' recipes, such as seed=7"
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=settings)


def status(parser: OneLineParser) -> None:
    """How long `status` looks."""
    parser.add_argument("--watch", action="store_true", help="show the progress until all of them are over")


def logs(parser: OneLineParser) -> None:
    """Whose logs, and how."""
    parser.add_argument("--stage", metavar="STAGE", help=f"one of {_STAGES} (default: the one that runs or failed)")
    parser.add_argument("--attempt", type=int, metavar="N", help="attempt of the stage (default: the newest)")
    parser.add_argument("--task", type=int, metavar="N", help="task of a stage that is an array (default: all)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="one rank only")
    which.add_argument("--failed", action="store_true", help="only ranks that failed")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run is over")
    parser.add_argument("--json", action="store_true", help="print each line as JSON, with its rank and time")


def prune(parser: OneLineParser) -> None:
    """What `ls` forgets."""
    text = "forget those whose directories are gone, and list these"
    parser.add_argument("--prune", action="store_true", help=text)


def trace(parser: OneLineParser) -> None:
    """Which steps are recorded."""
    parser.add_argument("--stage", metavar="STAGE", help=f"{either(TRAINED)} (default: the one that runs)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps to record (default: 3)")


def requeue(parser: OneLineParser) -> None:
    """How a run goes on."""
    parser.add_argument("--stages", metavar="A,B", help=f"add stages that the run did not have: {_STAGES}")
    parser.add_argument("--on", metavar="PROFILE", help="machine to go on with (default: the one that it had)")
    parser.add_argument(
        "--take-over", action="store_true", help="even if its supervisor was on another machine, which is gone for good"
    )
    parser.add_argument("--follow", action="store_true", help="show the progress; Ctrl-C leaves the run going")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="other resources, such as resources.processes=4"
    )


def doctor(parser: OneLineParser) -> None:
    """Which machines are checked, and what for."""
    parser.add_argument("--on", default="local", metavar="PROFILE", help="machines to check (default: local)")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes to ask (default: those of a stage, at least 2)")
    parser.add_argument("--shards", metavar="URL", help="folder of shards, or one shard, that the nodes read")
    parser.add_argument(
        "--wait", type=int, default=600, metavar="SECONDS", help="for nodes that are busy (default: 600)"
    )


def cluster(parser: OneLineParser) -> None:
    """What is done with the throw-away Slurm."""
    parser.add_argument("action", choices=("up", "down", "status"), help="start it, end it, show how it stands")
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="nodes to start (default: 3)")
    parser.add_argument("--hosts", action="store_true", help="nodes with addresses of their own (root only)")
    parser.add_argument("--dir", metavar="DIR", help="folder of all its files (default: in $VQSCALE_HOME)")
    parser.add_argument("--conf", action="store_true", help="print the path of slurm.conf alone (status)")


def drill(parser: OneLineParser) -> None:
    """Which stage meets which faults."""
    parser.add_argument("--stage", default="tokenizer", metavar="STAGE", help=f"{either(DRILLED)} (default: tokenizer)")
    faults = parser.add_mutually_exclusive_group()
    faults.add_argument(
        "--faults", metavar="LIST", help="such as 'kill:step=5; slow:step=7,rank=1' (default: one of each)"
    )
    faults.add_argument("--random", type=int, metavar="N", help="N kills at random moments instead")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments (default: 0)")


def read_elsewhere(parser: OneLineParser) -> None:
    """Whatever follows; what stands behind the command reads it, --help included."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
