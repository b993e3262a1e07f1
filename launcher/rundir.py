"""Makes run directories: the record of a run before anything of it has started."""

from __future__ import annotations

import getpass
import os
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
from vqscale.errors import UserError
from vqscale.files import write_bytes, write_json


def create(plan: Plan) -> RunLayout:
    """Make the run directory of a plan: recipe, run.json, code identity, state; and put it into the index."""
    layout = RunLayout(plan.job.run)
    _make(layout.root)
    created = time.time()
    run_id = _unused_id(layout.root.name)
    write_bytes(layout.recipe, dump_yaml(plan.job.recipe).encode())
    write_snapshot(plan.job.source, layout.code)
    resources = plan.job.recipe.resources
    RunState.new(plan.job.stages, {stage: resources.array_of(stage) for stage in plan.job.stages}).write(layout)
    info = {
        "id": run_id,
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
    if plan.shares:
        link(layout, plan.shares)
    write_json(layout.info, info)  # last: a directory with run.json is a whole run
    registry.register(run_id, layout.root, created)
    _link_latest(layout.root)
    return layout


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made ({error.strerror})", where=str(path), mend="choose --run DIR") from None


def _unused_id(name: str) -> str:
    """Directories chosen by the user may have equal names in different places; ids may not."""
    taken = {entry.id for entry in registry.entries() if entry.exists}
    candidates = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _link_latest(path: Path) -> None:
    """`latest` beside the runs; only where the launcher chose the place."""
    if path.parent != registry.runs_root().resolve():
        return
    beside = path.parent / f".latest.{os.getpid()}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(path.name)
    beside.replace(path.parent / "latest")
