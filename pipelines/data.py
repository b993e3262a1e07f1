"""`vqscale data`: images and shards into what a recipe can name, and what is in them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.data_commands import index, pack, verify
from pipelines.data_show import show
from vqscale.arguments import OneLineParser, examples, run_program

_EXAMPLES = {
    "pack": ("photos shards --size 64 --holdout 100", "images1024x1024 shards --size 1024 --no-classes"),
    "index": ("others", "shards/train shards/val --label json:category"),
    "verify": ("shards/train", "others --decode"),
    "show": ("shards/train --sheet sheet.png --samples 36", "'others/photos-{000..001}.tar' --sheet others.png"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vqscale data` and return its exit code."""
    return run_program(*_parsers(), sys.argv[1:] if arguments is None else arguments)


def _parsers() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """The parser of `vqscale data`, and those of its commands by name."""
    parser = OneLineParser(
        prog="vqscale data", description="Images and shards into what a recipe can name, and what is in them."
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    _add_pack(commands.add_parser("pack", help="pack images into WebDataset shards", description=pack.__doc__))
    _add_index(commands.add_parser("index", help="make a manifest of others' shards", description=index.__doc__))
    _add_verify(commands.add_parser("verify", help="compare shards with their manifest", description=verify.__doc__))
    _add_show(commands.add_parser("show", help="say what shards hold", description=show.__doc__))
    for name, command in commands.choices.items():
        command.epilog = examples(*(f"vqscale data {name} {words}" for words in _EXAMPLES[name]))
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser, dict(commands.choices)


def _add_pack(command: argparse.ArgumentParser) -> None:
    command.add_argument("src", type=Path, metavar="SRC", help="folder of class folders, or a tar or tar.gz of one")
    command.add_argument("dest", metavar="DEST", help="folder or URL for the shards")
    command.add_argument("--size", type=int, required=True, metavar="S", help="side of the stored square images")
    command.add_argument(
        "--holdout",
        type=int,
        default=0,
        metavar="N",
        help="hold out N images: writes DEST/train and DEST/validation (default: 0)",
    )
    command.add_argument("--format", choices=("jpeg", "png"), default="jpeg", help="png is lossless (default: jpeg)")
    command.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEGs, stored as 4:4:4 (default: 95)")
    command.add_argument(
        "--shard-samples",
        type=int,
        metavar="N",
        help="images a shard (default: about 64 MB, 24 shards or more)",
    )
    command.add_argument("--seed", type=int, default=0, help="of the shuffle and the held-out images (default: 0)")
    command.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: all cores)",
    )
    command.add_argument("--no-classes", action="store_true", help="folders are no classes; all images are without one")
    command.add_argument("--force", action="store_true", help="replace shards that DEST holds already")
    command.set_defaults(run=pack)


def _add_index(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "url",
        nargs="+",
        metavar="URL",
        help="folder of .tar files, one such file, or a pattern such as 'shards/{000..099}.tar' or 'shards/*/*.tar'",
    )
    command.add_argument(
        "--label",
        default="auto",
        metavar="RULE",
        help="where labels are: cls, txt, json:KEY, folder, none (default: auto, which finds out)",
    )
    names = command.add_mutually_exclusive_group()
    names.add_argument("--classes", metavar="FILE", help="names of the classes in their order, one a line")
    names.add_argument("--classes-from", metavar="URL", help="the classes of other shards, such as those for training")
    command.add_argument("--no-hash", action="store_true", help="compute no sha256, which reads every byte")
    command.add_argument("--keep-damaged", action="store_true", help="take what is whole of shards that are cut off")
    command.add_argument("--out", default="", metavar="FILE", help="write the manifest here, not beside the shards")
    command.add_argument("--force", action="store_true", help="replace a manifest that is there already")
    _add_threads(command)
    command.set_defaults(run=index)


def _add_verify(command: argparse.ArgumentParser) -> None:
    _add_shards(command)
    command.add_argument("--decode", action="store_true", help="also decode every image, and list those that are bad")
    _add_threads(command)
    command.set_defaults(run=verify)


def _add_show(command: argparse.ArgumentParser) -> None:
    _add_shards(command)
    command.add_argument("--sheet", metavar="PNG", help="write some images side by side into this file")
    command.add_argument("--samples", type=int, default=64, metavar="N", help="images on the sheet (default: 64)")
    command.set_defaults(run=show)


def _add_shards(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "url",
        nargs="+",
        metavar="URL",
        help="folder with a manifest.json, a manifest, or a pattern such as 'shards/{000..099}.tar'",
    )


def _add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="shards read at once; remote ones lie in memory (default: by cores)",
    )


if __name__ == "__main__":
    sys.exit(main())
