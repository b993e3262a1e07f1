"""`vqscale bench`: measures, prints what was found, and compares results."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from benchmarks import compare, plots, registry
from benchmarks.harness import Bench, Options, WrongResultError
from benchmarks.network import cluster_of
from benchmarks.progress import progress
from benchmarks.render import render, write_page
from benchmarks.report import print_comparison, print_result
from benchmarks.result import Result, write_result
from vqscale.arguments import OneLineParser
from vqscale.errors import EXIT_USER_ERROR, UserError

EXIT_WRONG = 1
"""Exit code when a contender computed something wrong, or when `--compare` finds something slower."""


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
        epilog="examples:\n"
        "  vqscale bench loader --data photos.tar\n"
        "  vqscale bench scaling --on my-cluster.yaml\n"
        "  vqscale bench --compare before after\n"
        "exit code: 1 when a contender computes something wrong or --compare finds something slower, 2 for bad input",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks (default: all; see --list)")
    parser.add_argument("--rounds", type=_rounds, metavar="N", help="rounds of each race (default: 7); more see less")
    parser.add_argument("--quick", action="store_true", help="see that they run: little work, figures that say nothing")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), metavar="DIR", help="results (default: out/bench)"
    )
    parser.add_argument("--data", type=Path, metavar="TAR", help="tar or folder of photographs to measure with")
    parser.add_argument("--on", metavar="PROFILE", help="scaling: predict for the nodes and the network of a profile")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--list", action="store_true", help="list the benchmarks")
    other.add_argument("--schema", action="store_true", help="print the JSON Schema of results")
    other.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="what is slower in B: two results, or two folders"
    )
    other.add_argument("--render", type=Path, metavar="MD", help="write the tables of the kept results into a document")
    parser.add_argument("--force", action="store_true", help="compare even if the machines differ")
    parser.add_argument(
        "--tolerance",
        type=_percent,
        default=compare.TOLERANCE,
        metavar="P",
        help="percent slower at most (default: 10)",
    )
    return parser


def _rounds(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _percent(text: str) -> float:
    share = float(text) / 100
    if not 0 < share < 1:
        raise ValueError
    return share


def _run(options: argparse.Namespace) -> int:
    if options.list:
        for name, entry in registry.BENCHMARKS.items():
            print(f"{name:<12} {entry.about}")
    elif options.schema:
        print(json.dumps(Result.model_json_schema(), indent=2))
    elif options.compare:
        return _compare(options)
    elif options.render:
        render(options.render)
    else:
        return _measure(options)
    return 0


def _measure(options: argparse.Namespace) -> int:
    names = registry.require(options.names)
    if options.on:
        cluster_of(options.on)  # before minutes are spent
    asked = Options(options.quick, options.data, options.rounds, options.on)
    found, failed = [], []
    for name in names:
        try:
            result = measure(name, asked) if len(names) == 1 else apart(name, asked)
        except WrongResultError as error:
            if len(names) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)  # the others may be right
            failed.append(name)
            continue
        path = write_result(options.out, result)
        print(f"{name}: {result.seconds:.0f} s; written to {path}", file=sys.stderr)
        found.append(result)
        if not plots.available():
            plots.draw(result, path.with_suffix(".png"))
        if not options.json:
            print_result(result)
    if options.json:
        results = [result.model_dump(mode="json") for result in found]
        print(json.dumps(results[0] if len(names) == 1 else results, indent=1))
    if found:
        _say_what_next(options, write_page(options.out))
    if failed:
        print(f"error: no results, nothing written: {', '.join(failed)}", file=sys.stderr)
    return EXIT_WRONG if failed else 0


def _say_what_next(options: argparse.Namespace, page: Path) -> None:
    lines = [f"all of it: {page}"]
    if why := plots.available():
        lines.append(f"no plots: {why}")
    again = " ".join(["vqscale bench", *options.names])
    if options.quick:
        lines.append(f"next: {again}  # without --quick, for figures that say something")
    else:
        lines.append(f"next: {again} --out OTHER, then vqscale bench --compare {options.out} OTHER")
    print("\n".join(lines), file=sys.stderr)


def _compare(options: argparse.Namespace) -> int:
    """Print what changed between results, and say by the exit code whether something became slower."""
    files, single = compare.pairs(*options.compare)
    found = {}
    for one, other in files:
        before, after = compare.read_pair(one, other, options.force)
        found[before.name] = changed = compare.changes(before, after)
        print_comparison(before, after, changed, options.tolerance)
    for name in single:
        print(f"note: only one of the folders has {name}")
    print("* more than the noise between the rounds explains; SLOWER?: the intervals overlap, it may be noise")
    slower = compare.flagged(found, options.tolerance)
    for line in slower:
        print(f"slower by more than {options.tolerance:.0%}: {line}")
    if slower:
        print("next: measure both again, with more rounds (--rounds 21) and nothing else on the machine")
    return EXIT_WRONG if slower else 0


def measure(name: str, options: Options) -> Result:
    """Run one benchmark in a temporary folder."""
    benchmark = registry.load(name)
    with tempfile.TemporaryDirectory(prefix="vqscale-bench-") as folder, progress(name) as report:
        bench = Bench(name, Path(folder), options, benchmark.GOALS, benchmark.PACKAGES, report)
        benchmark.run(bench)
        return bench.finish()


def apart(name: str, options: Options) -> Result:
    """Run one benchmark in a process of its own, since some keep all memory that they ever had, as stages do.

    Raises:
        WrongResultError: a contender computes something wrong, or the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:  # torch is not loaded yet
        try:
            return pool.submit(measure, name, options).result()
        except BrokenProcessPool:
            raise WrongResultError(f"{name}: its process was killed; is there too little memory?") from None


if __name__ == "__main__":
    sys.exit(main())
