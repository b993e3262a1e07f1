"""Commands whose work is done elsewhere: data, codes, sample, evaluate, export, bench; and schema."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from launcher.backends.base import SOURCE
from launcher.sweep import resolve_one


def data(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.data`."""
    _hand_over("pipelines.data", arguments.arguments)


def codes(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.codes`."""
    _hand_over("pipelines.codes", arguments.arguments)


def sample(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.draw`."""
    _hand_over("pipelines.draw", _with_directory(arguments.arguments))


def evaluate(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.reevaluate`."""
    _hand_over("pipelines.reevaluate", _with_directory(arguments.arguments))


def export(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.export`."""
    _hand_over("pipelines.export", _with_directory(arguments.arguments))


def _with_directory(words: list[str]) -> list[str]:
    """The words with a run's directory in the place of its name, which is the first of them."""
    return [str(resolve_one(words[0]).root), *words[1:]] if words and not words[0].startswith("-") else words


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
