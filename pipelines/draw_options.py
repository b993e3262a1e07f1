"""The command line of `vqscale sample`, and the settings that it makes of a recipe's."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from vqscale.arguments import RUN_HELP, OneLineParser, either, examples
from vqscale.config.load import parse
from vqscale.config.recipe import Sample
from vqscale.data.keep import HALVES
from vqscale.errors import UserError

_SETTINGS = ("count", "per_class", "seed", "temperature", "top_k", "top_p", "guidance", "batch", "output")
_OUTPUTS = either(get_args(Sample.model_fields["output"].annotation))
_SOURCES = ("from_codes", "complete", "details_of")


def command_parser() -> OneLineParser:
    """The parser of `vqscale sample`."""
    text = "Draw images from a finished run into any folder. What is not said is as in the run's recipe."
    some = examples(
        "vqscale sample latest --out elevens --classes 11 --count 16 --guidance 3",
        "vqscale sample latest --out completed --complete pictures --keep left-half",
    )
    parser = OneLineParser(prog="vqscale sample", description=text, epilog=some)
    parser.add_argument("run", metavar="RUN", help=f"{RUN_HELP}; the first word")
    parser.add_argument("overrides", nargs="*", default=[], metavar="sample.key=value", help="settings of the recipe")
    parser.add_argument("--out", metavar="DIR", help="folder for the images (default: RUN-samples here)")
    parser.add_argument("--force", action="store_true", help="replace the images of another drawing in DIR")
    _add_settings(parser.add_argument_group("what is drawn"))
    _add_given(parser.add_argument_group("what is known already"))
    _add_machine(parser.add_argument_group("where"))
    return parser


def _add_settings(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--classes", metavar="A,B", help="classes, by name or index; they take turns")
    group.add_argument("--count", metavar="N", help="images in all")
    group.add_argument("--per-class", metavar="N", help="images for each class, where --count is not given")
    group.add_argument("--seed", metavar="N", help="image i depends on (seed, i) and its class alone")
    group.add_argument("--temperature", metavar="T", help="softmax temperature")
    group.add_argument("--top-k", metavar="K", help="draw among the K likeliest codes only; 0 keeps all")
    group.add_argument("--top-p", metavar="P", help="the smallest set of codes that holds this probability")
    group.add_argument("--guidance", metavar="S", help="scale of classifier-free guidance; 1 is none")
    group.add_argument("--output", metavar="FORM", help=f"{_OUTPUTS} (default: as sample.output)")


def _add_given(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--from-codes", metavar="FILE", help=".npz of codes by level (-1 is drawn), or a code shard")
    group.add_argument("--complete", metavar="IMAGES", help="file or folder; a part of each is kept, the rest drawn")
    group.add_argument("--keep", metavar="PART", help=f"of --complete: {', '.join(HALVES)}, or an image, white is kept")
    group.add_argument("--details-of", metavar="IMAGES", help="file or folder; all levels but the finest are kept")
    group.add_argument("--levels", metavar="A,B", help="of --from-codes and --details-of: the levels that are kept")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--batch", metavar="N", help="images that are drawn at once by each process")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="(default: auto, a GPU if there is one)",
    )
    group.add_argument("--processes", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


def settings_of(options: argparse.Namespace, recipe: Sample) -> Sample:
    """The recipe's settings with those of the command line.

    Raises:
        UserError: a value that is none of its setting.
    """
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    given = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    if "per_class" in given and "count" not in given:
        tree["count"] = None
    classes = {"classes": _words(options.classes)} if options.classes is not None else {}
    return parse(Sample, tree | given | classes, "vqscale sample")


def require_one_source(options: argparse.Namespace) -> None:
    """Whether what is known is said once, and in full.

    Raises:
        UserError: it is not.
    """
    where = "vqscale sample"
    named = [f"--{name.replace('_', '-')}" for name in _SOURCES if getattr(options, name) is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} exclude each other", where=where, mend="give one of them")
    if (options.keep is None) != (options.complete is None):
        raise UserError("--complete and --keep go together", where=where, mend=f"--keep {HALVES[0]}, say")
    if options.levels is not None and named not in (["--from-codes"], ["--details-of"]):
        raise UserError("--levels goes with --from-codes or --details-of", where=where, mend="leave it out")
    if options.processes < 1:
        raise UserError(f"{options.processes} processes", where="--processes", mend="use 1 or more")


def levels_of(options: argparse.Namespace) -> list[str]:
    """The levels that are to be kept; empty where that is not said."""
    return _words(options.levels or "")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
