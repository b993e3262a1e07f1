"""Who writes what, and the copy of it that training may no longer change."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from vqscale.checkpoint.header import Place, arrange
from vqscale.checkpoint.manifest import Part, TensorRecord, sorted_parts
from vqscale.training.checkpoints.group import Group
from vqscale.training.checkpoints.held import DTYPES, Held

Layout = tuple[tuple[str, tuple[int, ...], str, tuple[tuple[int, int], ...]], ...]
"""What this rank holds, without the values: plans are made anew only when it changes."""


def layout_of(state: Mapping[str, Held]) -> Layout:
    """Names, shapes, dtypes and ranges."""
    return tuple(
        (name, held.shape, held.dtype, tuple((start, piece.local.numel()) for start, piece in held.pieces.items()))
        for name, held in state.items()
    )


def file_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Plan:
    """Who writes what; made by DCP's planner, equal on all ranks but for `items`."""

    items: SavePlan
    """This rank's."""
    metadata: Metadata
    """DCP's, of all tensors."""
    tensors: dict[str, TensorRecord]
    """The same for the manifest."""
    head: bytes
    """Of this rank's file."""
    places: dict[str, Place]
    """Where each part lies in this rank's file."""
    total: int
    """Bytes of all ranks' tensors."""

    @property
    def size(self) -> int:
        """Bytes of this rank's file; 0 where it writes none."""
        return max((place.end for place in self.places.values()), default=0)


def make_plan(state: dict[str, Held], group: Group) -> Plan:
    """Share the writing among the ranks: each part once, replicas where the least has to be written; collective."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, is_coordinator=group.first)
    shapes = {name: (held.shape, held.dtype) for name, held in state.items()}
    # A rank may hold nothing of a tensor that others hold, so shapes go along.
    local = replace(planner.create_local_plan(), planner_data=shapes)
    plans, metadata = planner.create_global_plan(group.gather(local))
    everyones = {name: entry for plan in plans for name, entry in plan.planner_data.items()}
    tensors = _records(plans, everyones)
    mine = {_key(item): (everyones[item.index.fqn][1], _count(item)) for item in plans[group.rank].items}
    head, places = arrange(mine)
    total = sum(held.elements * DTYPES[held.dtype].itemsize for held in tensors.values())
    return Plan(plans[group.rank], metadata, tensors, head, places, total)


def _records(plans: list[SavePlan], shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, TensorRecord]:
    parts: dict[str, list[Part]] = {name: [] for name in shapes}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            parts[item.index.fqn].append(Part(file_name(rank), _start(item), _count(item)))
    return {
        name: TensorRecord(shape=shape, dtype=dtype, parts=sorted_parts(parts[name]))
        for name, (shape, dtype) in shapes.items()
    }


def _start(item: WriteItem) -> int:
    assert item.index.offset is not None
    return item.index.offset[0]


def _count(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes[0]


def _key(item: WriteItem) -> str:
    return Part("", _start(item), 0).key(item.index.fqn)


class Staging:
    """A buffer that holds this rank's whole file, used again by every save.

    Args:
        device: of the tensors; from a GPU they are copied into pinned memory, without waiting for each.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def fill(self, plan: Plan, state: Mapping[str, Held]) -> memoryview:
        """Copy this rank's parts, which may change afterwards; returns its whole file, valid until the next call."""
        if not plan.size:
            return memoryview(b"")
        if len(self._buffer) != plan.size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # two at once would be too many
            pinned = self._device.type == "cuda"
            self._buffer = torch.empty(plan.size, dtype=torch.uint8, pin_memory=pinned)
        self._buffer[: len(plan.head)] = torch.frombuffer(bytearray(plan.head), dtype=torch.uint8)
        plain: list[tuple[Tensor, Tensor]] = []
        for item in plan.items.items:
            local = state[item.index.fqn].pieces[_start(item)].local
            target = _view(self._buffer, plan.places[_key(item)])
            if local.device.type == "cpu" and local.is_contiguous():
                plain.append((target, local.view(-1)))
            else:
                target.view(local.shape).copy_(local, non_blocking=True)
        _copy(plain)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._buffer.numpy().data


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy flat tensors on the CPU by memcpy, on as many threads as torch has.

    Torch's own copy meets all its threads behind each tensor; on a machine with other work that took ten times as long.
    Here each thread takes the next tensor that nobody has.
    """
    todo = iter([(one.view(torch.uint8).numpy(), other.view(torch.uint8).numpy()) for one, other in pairs])

    def work() -> None:
        for target, source in todo:
            np.copyto(target, source)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work) for _ in range(threads)]:
            done.result()


def _view(buffer: Tensor, place: Place) -> Tensor:
    return buffer[place.begin : place.end].view(DTYPES[place.dtype])


class StagedPlanner(SavePlanner):
    """Gives DCP's `save` the plan that is made already, and the staged copies.

    Args:
        plan: of this rank.
        file: what `Staging.fill` returned.
    """

    def __init__(self, plan: Plan, file: memoryview) -> None:
        self.plan, self.file = plan, file

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Nothing is left to prepare."""

    def create_local_plan(self) -> SavePlan:
        """None: nothing has to go around again."""
        return SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The metadata of the plan."""
        return all_plans, self.plan.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan."""
        return self.plan.items

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The staged copy of an item."""
        return _view(torch.frombuffer(self.file, dtype=torch.uint8), self.plan.places[_key(write_item)])
