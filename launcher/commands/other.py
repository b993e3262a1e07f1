"""Commands beside runs: data, schema."""

from __future__ import annotations

import argparse
import json
import os
import sys

from launcher.backends.local import SOURCE


def data(arguments: argparse.Namespace) -> int:
    """Hand over to `pipelines.data`, which may import what the launcher may not."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    # -P: a folder called `pipelines` in the user's directory is not taken for ours.
    command = [sys.executable, "-P", "-m", "pipelines.data", *arguments.arguments]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON Schema of recipes."""
    from vqscale.config.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0
