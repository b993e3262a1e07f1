"""`vqscale evaluate`: measure a finished run again, with other settings, on any number of processes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipelines.data_report import print_json, progress
from pipelines.evaluate import assemble, own_images, write_report
from pipelines.measuring import measure
from pipelines.processes import Alone, launch, ranks_of
from pipelines.stage import Stage
from vqscale.arguments import RUN_HELP, OneLineParser, examples
from vqscale.config.layout import RunLayout
from vqscale.config.load import load_recipe
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.model_files import is_run
from vqscale.training.distributed import Ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vqscale evaluate` and return its exit code; under torchrun, as one of its ranks."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse(words)
        recipe = _require(options)
        if options.processes > 1 and "RANK" not in os.environ:
            return launch("pipelines.reevaluate", options.processes, words)
        with ranks_of(options.device) as ranks:
            return _evaluate(options, recipe, ranks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130


def _parser() -> OneLineParser:
    text = "Measure a finished run again. What is not said is as in the run's recipe."
    some = examples(
        "vqscale evaluate latest --out again evaluate.likelihood=gaussian",
        "vqscale evaluate latest --out report evaluate.features=inception-2015-12-05.pt",
    )
    parser = OneLineParser(prog="vqscale evaluate", description=text, epilog=some)
    parser.add_argument("run", metavar="RUN", help=f"{RUN_HELP}; the first word")
    parser.add_argument("overrides", nargs="*", default=[], metavar="evaluate.key=value", help="settings of the recipe")
    parser.add_argument("--out", metavar="DIR", help="folder for the report (default: the run's own is replaced)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="(default: auto, a GPU if there is one)",
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _require(options: argparse.Namespace) -> Any:
    """The run's recipe with the settings of the command line.

    Raises:
        UserError: no run, or settings of something else.
    """
    if not is_run(options.run):
        raise UserError("is no run directory", where=options.run, mend="vqscale ls lists the runs")
    if options.processes < 1:
        raise UserError(f"{options.processes} processes cannot measure", where="--processes", mend="use 1 or more")
    other = [text for text in options.overrides if not text.startswith("evaluate.")]
    if other:
        raise UserError(
            f"'{other[0]}' is not a setting of evaluate", where="vqscale evaluate", mend="use evaluate.KEY=VALUE"
        )
    return load_recipe(RunLayout(Path(options.run).resolve()).recipe, options.overrides)


def _evaluate(options: argparse.Namespace, recipe: Any, ranks: Ranks | Alone) -> int:
    layout, began = RunLayout(Path(options.run).resolve()), time.time()
    stage = Stage("evaluate", layout, recipe, ranks, 1)  # type: ignore[arg-type]
    total, done = own_images(stage), 0
    with progress("measuring", "images") if ranks.first else nullcontext(lambda done, total: None) as show:

        def seen(count: int) -> None:
            nonlocal done
            done += count
            show(done, total)

        figures = measure(stage, seen)
    if ranks.first:
        report = assemble(stage, figures, time.time() - began)
        folder = Path(options.out) if options.out else layout.root
        write_report(folder, layout, report)
        if options.json:
            print_json(report)
        else:
            _say(report, folder / layout.report_page.name)
    return 0


def _say(report: dict[str, Any], page: Path) -> None:
    for name, value in report.items():
        if not isinstance(value, (dict, list)):
            print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    print(f"\nlook at it: {page}")


if __name__ == "__main__":
    sys.exit(main())
