"""`vqscale codes`: code shards from one place to another, and what is in them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines.codes_commands import copy, verify
from pipelines.codes_show import show
from vqscale.arguments import OneLineParser, examples, run_program

_FOLDER = "folder or URL of code shards, or one with train and validation in it, such as RUN/codes"


_EXAMPLES = {
    "pull": ("runs/latest/codes elsewhere", "s3://bucket/codes codes --fraction 0.1"),
    "push": ("runs/latest/codes s3://bucket/codes",),
    "verify": ("runs/latest/codes --tokenizer runs/latest",),
    "show": ("runs/latest/codes", "runs/latest/codes/train --tokenizer runs/latest --out sheet.png"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vqscale codes` and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return run_program(*_parsers(), words, stopped="stopped; the same command goes on from here")


def _parsers() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """The parser of `vqscale codes`, and those of its commands by name."""
    parser = OneLineParser(
        prog="vqscale codes", description="Code shards from one place to another, and what is in them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    _add_copy(commands.add_parser("pull", help="copy code shards to this machine", description=copy.__doc__))
    _add_copy(commands.add_parser("push", help="copy code shards to a storage", description=copy.__doc__))
    _add_verify(commands.add_parser("verify", help="compare shards with their manifest", description=verify.__doc__))
    _add_show(commands.add_parser("show", help="say what shards hold", description=show.__doc__))
    for name, command in commands.choices.items():
        command.epilog = examples(*(f"vqscale codes {name} {words}" for words in _EXAMPLES[name]))
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser, dict(commands.choices)


def _add_copy(command: argparse.ArgumentParser) -> None:
    command.add_argument("src", metavar="SRC", help=_FOLDER)
    command.add_argument("dest", metavar="DEST", help="folder or URL for the copies")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--shards", default="", metavar="A-B", help="only these, by number, such as 0-99; held-out ones come whole"
    )
    which.add_argument(
        "--fraction", type=float, metavar="F", help="only so many of the first, such as 0.1; held-out ones come whole"
    )
    _add_threads(command)
    command.set_defaults(run=copy)


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("url", metavar="URL", help=_FOLDER)
    command.add_argument("--tokenizer", metavar="RUN", help="run directory whose tokenizer must have made them")
    _add_threads(command)
    command.set_defaults(run=verify)


def _add_show(command: argparse.ArgumentParser) -> None:
    command.add_argument("url", metavar="URL", help=_FOLDER)
    command.add_argument("--tokenizer", metavar="RUN", help="run directory whose tokenizer decodes some of them")
    command.add_argument("--out", metavar="PNG", help="write the decoded images side by side into this file")
    command.add_argument("--samples", type=int, default=64, metavar="N", help="images on the sheet (default: 64)")
    command.set_defaults(run=show)


def _add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="shards read at once; remote ones lie in memory (default: by cores)",
    )


if __name__ == "__main__":
    sys.exit(main())
