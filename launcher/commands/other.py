"""Commands beside runs: data, codes, export, bench, schema."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from launcher.backends.local import SOURCE
from launcher.registry import resolve


def data(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.data`."""
    _hand_over("pipelines.data", arguments.arguments)


def codes(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.codes`."""
    _hand_over("pipelines.codes", arguments.arguments)


def export(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.export`, with the run's directory in the place of its id."""
    words = [arguments.place, *(f"--{name}" for name in ("force", "json") if getattr(arguments, name))]
    _hand_over("pipelines.export", [str(resolve(arguments.run).root), *words])


def bench(arguments: argparse.Namespace) -> int:
    """Hand over to `benchmarks`."""
    _hand_over("benchmarks", arguments.arguments)


def _hand_over(module: str, arguments: Sequence[str]) -> NoReturn:
    """Become a program that may import what the launcher may not."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    # -P: a folder called `pipelines` or `benchmarks` in the user's directory is not taken for ours.
    command = [sys.executable, "-P", "-m", module, *arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of recipes."""
    from vqscale.config.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0
