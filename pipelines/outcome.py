"""How a stage's processes say what became of them: the markers of success, of each task's part, and of failure."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

Once = Callable[[list[dict[str, Any]]], dict[str, Any]]
"""What is done once, when all shares are done: from the figures of all tasks to those of the stage."""


def leave_marker(layout: RunLayout, name: str, tasks: int, once: Once | None, facts: dict[str, Any]) -> None:
    """Finish the stage if nothing is left to do; the task's own marker comes last, so that a kill repeats this.

    Args:
        layout: the run, or one task of an array.
        name: of the stage.
        tasks: that share its work.
        once: finishes it; None where nothing is left to do.
        facts: what this task has done.
    """
    parts = [facts] if tasks == 1 else _all_parts(layout, name, tasks, facts)
    if parts:
        head = {key: facts[key] for key in ("stage", "attempt")} | {"seconds": max(part["seconds"] for part in parts)}
        array = {"tasks": tasks} if tasks > 1 else {}
        write_json(layout.whole.done(name), {**head, **array, **(once(parts) if once else facts)})
    if tasks > 1:
        write_json(layout.done(name), facts)


def _all_parts(layout: RunLayout, name: str, tasks: int, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Leave what this task has done; what all have done, in their order, if none is missing.

    The folder is listed after this task's own file was renamed into it, so a network file system cannot answer from
    an older listing, and the last of two that end together sees both.
    """
    folder = layout.parts(name)
    write_json(folder / f"{layout.task:03d}.json", facts)
    names = {path.name for path in folder.iterdir()}
    wanted = [f"{task:03d}.json" for task in range(tasks)]
    return [read_json(folder / one) for one in wanted] if names.issuperset(wanted) else []


@contextmanager
def recorded(layout: RunLayout, name: str) -> Iterator[None]:
    """An error that leaves this block is put down in `failure.json`, and goes on its way."""
    try:
        yield
    except Exception as error:
        kind = kind_of(error)
        fail(layout, name, kind, str(error) if kind == "user" else f"{type(error).__name__}: {error}")
        raise


def kind_of(error: Exception) -> str:
    """What sort of error ends a stage: `user`, `diverged`, `network`, `device`, or `error`."""
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, FloatingPointError):
        return "diverged"
    if isinstance(error, torch.AcceleratorError):
        return "device"
    # Gloo's own errors are plain RuntimeErrors that begin with the file they come from.
    if isinstance(error, (dist.DistError, ConnectionError, TimeoutError)) or "/gloo/transport/" in str(error):
        return "network"
    return "error"


def node_name() -> str:
    """What the launcher or the scheduler calls this machine, where there is one; else its own name."""
    names = (os.environ.get("VQSCALE_NODE"), os.environ.get("SLURMD_NODENAME"), socket.gethostname())
    return next(filter(None, names))


def fail(layout: RunLayout, name: str, kind: str, message: str, suspects: Sequence[str] = ()) -> None:
    """The first rank that fails says why; the others fail because of it."""
    if not layout.failure(name).exists():
        rank, blamed = int(os.environ.get("RANK", "-1")), [node_name()] if kind == "device" else list(suspects)
        facts = {"stage": name, "kind": kind, "rank": rank, "node": node_name(), "suspects": blamed}
        write_json(layout.failure(name), {**facts, "message": message})
