"""`vqscale bench`: measures, prints what was found, and compares results."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import registry
from benchmarks.harness import Bench, Options, WrongResultError
from benchmarks.progress import progress
from benchmarks.render import render
from benchmarks.report import print_comparison, print_result
from benchmarks.result import Result, write_result
from vqscale.arguments import OneLineParser
from vqscale.errors import EXIT_USER_ERROR, UserError

EXIT_WRONG = 1
"""Exit code when a contender computed something wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vqscale bench` and return its exit code."""
    try:
        return _run(_parser().parse(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except WrongResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG
    except KeyboardInterrupt:
        return 130


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="vqscale bench",
        description="Measure against peers and against what is possible, in turns, and write DIR/NAME.json.",
        epilog="example: vqscale bench loader --data photos.tar",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all; see --list)")
    parser.add_argument("--quick", action="store_true", help="see that they run: little work, figures that say nothing")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="default: out/bench")
    parser.add_argument("--data", type=Path, metavar="TAR", help="tar or folder of photographs to measure with")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--list", action="store_true", help="list the benchmarks")
    other.add_argument("--schema", action="store_true", help="print the JSON Schema of results")
    other.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="print two results' ratios side by side")
    other.add_argument("--render", type=Path, metavar="MD", help="write the tables of the kept results into a document")
    parser.add_argument("--force", action="store_true", help="compare even if the machines differ")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.list:
        for name, entry in registry.BENCHMARKS.items():
            print(f"{name:<12} {entry.about}")
    elif options.schema:
        print(json.dumps(Result.model_json_schema(), indent=2))
    elif options.compare:
        print_comparison(options.compare, options.force)
    elif options.render:
        render(options.render)
    else:
        _measure(options)
    return 0


def _measure(options: argparse.Namespace) -> None:
    found = []
    for name in registry.require(options.names):
        result = measure(name, Options(options.quick, options.data))
        path = write_result(options.out, result)
        print(f"{name}: written to {path}", file=sys.stderr)
        found.append(result)
        if not options.json:
            print_result(result)
    if options.json:
        results = [result.model_dump(mode="json") for result in found]
        print(json.dumps(results[0] if len(results) == 1 else results, indent=1))


def measure(name: str, options: Options) -> Result:
    """Run one benchmark in a temporary folder."""
    benchmark = registry.load(name)
    with tempfile.TemporaryDirectory(prefix="vqscale-bench-") as folder, progress(name) as report:
        bench = Bench(name, Path(folder), options, benchmark.GOALS, benchmark.PACKAGES, report)
        benchmark.run(bench)
        return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
