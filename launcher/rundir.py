"""Makes run directories: the record of a run before anything of it has started."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from launcher import registry
from launcher.plan import Plan
from launcher.sharing import link
from launcher.snapshot import write_snapshot
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.config.load import dump_yaml
from vqscale.files import write_bytes, write_json


def create(plan: Plan) -> RunLayout:
    """Make the run directory of a plan: recipe, run.json, code identity, state; and put it into the index.

    Raises:
        UserError: it cannot be made, or the index not written; nothing is left then.
    """
    registry.require_writable()
    layout = RunLayout(_make(plan))
    try:
        _fill(layout, plan)
    except BaseException:
        remove(layout.root)
        raise
    return layout


def remove(root: Path) -> None:
    """Undo `create` where nothing has begun; also for the folder of several runs."""
    for entry in registry.everything():
        if entry.path == root:
            registry.drop(entry)
    shutil.rmtree(root, ignore_errors=True)
    latest = root.parent / "latest"
    if latest.is_symlink() and os.readlink(latest) == root.name:
        latest.unlink()
        earlier = [entry.path for entry in registry.entries() if entry.path.parent == root.parent and entry.exists]
        if earlier:
            _link_latest(earlier[-1])


def _make(plan: Plan) -> Path:
    """The directory of the plan; another one where that was taken meanwhile, and nobody has asked for it by name."""
    path = plan.job.run
    while not registry.make_directory(path):
        if plan.named:
            raise registry.taken(path)
        path = registry.choose_directory(plan.job.recipe.name, None)
    return path


def _fill(layout: RunLayout, plan: Plan) -> None:
    created = time.time()
    write_bytes(layout.recipe, dump_yaml(plan.job.recipe).encode())
    write_snapshot(plan.job.source, layout.code)
    resources = plan.job.recipe.resources
    RunState.new(plan.job.stages, {stage: resources.array_of(stage) for stage in plan.job.stages}).write(layout)
    if plan.shares:
        link(layout, plan.shares)
    info = {
        "id": registry.claim(layout.root.name, layout.root, created),
        "name": plan.job.recipe.name,
        "created": created,
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "command": sys.argv,
        "directory": os.getcwd(),
        "recipe": plan.recipe,
        "overrides": list(plan.overrides),
        "profile": plan.job.profile.model_dump(mode="json"),
        "warnings": list(plan.warnings),
        **({"shares": plan.shares.facts()} if plan.shares else {}),
    }
    write_json(layout.info, info)  # last: a directory with run.json is a whole run
    _link_latest(layout.root)


def _link_latest(path: Path) -> None:
    """`latest` beside the runs; only where the launcher chose the place."""
    if path.parent != registry.runs_root().resolve():
        return
    beside = path.parent / f".latest.{os.getpid()}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(path.name)
    beside.replace(path.parent / "latest")
