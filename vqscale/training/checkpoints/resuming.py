"""Finding the checkpoint to go on from, and filling a training with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from vqscale.checkpoint import folder
from vqscale.checkpoint.folder import Stored
from vqscale.checkpoint.manifest import FaultError
from vqscale.errors import UserError
from vqscale.training.checkpoints.faults import storage_fault
from vqscale.training.checkpoints.fitting import Entry, require_fit, require_run
from vqscale.training.checkpoints.group import Group
from vqscale.training.checkpoints.held import hold
from vqscale.training.checkpoints.reader import HeldPlanner, Reader
from vqscale.training.checkpoints.seams import Engine, Task


def choose(where: str, group: Group, made_by: Mapping[str, str]) -> tuple[Stored | None, list[str]]:
    """The newest valid checkpoint by all ranks' judgement, and a line for each one passed over; collective.

    Raises:
        UserError: the storage cannot be reached by one of them, or holds another run's.
    """
    notes: list[str] = []
    for step in group.first_says(lambda: folder.steps(where)):
        found, fault = group.first_says(lambda step=step: _open(where, step))  # type: ignore[misc]
        if found is not None:
            require_run(found, made_by)
            fault = next(filter(None, group.each(lambda found=found: _check(found, group))), "")  # type: ignore[misc]
            if not fault:
                return found, notes
        notes.append(folder.passed_over(where, step, fault))
    return None, notes


def _check(stored: Stored, group: Group) -> str:
    """What is wrong with this rank's share of the files."""
    mine = list(stored.manifest.files)[group.rank :: group.world]
    return next((fault for name in mine if (fault := folder.file_fault(stored, name))), "")


def load(stored: Stored, engine: Engine, task: Task, group: Group) -> set[str]:
    """Fill the pieces of engine and task; returns the names of their tensors, over all ranks; collective.

    Raises:
        UserError: the checkpoint does not fit, or a file cannot be read.
    """
    state = hold([*engine.pieces(), *task.pieces()])
    mine: dict[str, Entry] = {name: (held.shape, held.dtype) for name, held in state.items()}
    wanted = {name: entry for part in group.gather(mine) for name, entry in part.items()}
    require_fit(stored, wanted)
    try:
        dcp.load(state, storage_reader=Reader(stored), planner=HeldPlanner(), process_group=group.process_group)
    except CheckpointException as error:
        fault = storage_fault(error)
        raise UserError(f"cannot be loaded ({fault})", where=stored.url) from None
    for held in state.values():
        held.settle()
    return set(wanted)


def _open(where: str, step: int) -> tuple[Stored | None, str]:
    try:
        return folder.open_stored(where, step), ""
    except FaultError as fault:
        return None, str(fault)
