"""Ranks: read strictly from the environment, joined in one process group that is always torn down."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vqscale.errors import UserError
from vqscale.models.fp32 import exact_fp32

_OWN: list[dist.ProcessGroup] = []
"""Groups besides the one of the process, as long as that one lives."""
_LEFT: list[Any] = []
"""The groups that were left last, kept so that nobody frees them together with what used them.

Freeing a gloo group waits for its threads, and one of them may still wait for Python's lock to let go of a tensor of
the last collective. Who frees it with that lock in its hands, as DDP's reducer does where it is the last to know the
group, waits for ever (torch 2.13). When the next groups are left, the threads of these have been idle for long.
"""
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of a stage."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce in place over all ranks, by addition."""
        dist.all_reduce(tensor)
        return tensor


@contextmanager
def process_group(device: str = "auto", timeout_s: int = 600) -> Iterator[Ranks]:
    """Join the process group that the environment describes; leave it on every way out. fp32 is exact from here on.

    Nothing falls back to one process or to localhost: an incomplete environment is an error.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_s: longest wait in a collective.

    Raises:
        UserError: rank variables are missing, or CUDA was asked for and is not there.
    """
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the rank environment lacks {', '.join(missing)}",
            mend="start stages by `vqscale submit` or `torchrun -m pipelines.STAGE --run-dir DIR`",
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    chosen = choose_device(device, local_rank)
    exact_fp32()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local_rank, chosen)
    finally:
        _LEFT[:] = [dist.group.WORLD, *_OWN]
        _OWN.clear()
        dist.destroy_process_group()


def gloo_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A further group of all ranks, for agreements beside training's own collectives; collective.

    Args:
        timeout: longest wait in one of its collectives; None is gloo's.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    _OWN.append(group)
    return group


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device of a process: `cpu`, `cuda`, or what `auto` finds.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    enough = torch.cuda.is_available() and torch.cuda.device_count() > local_rank
    if device == "cuda" and not enough:
        raise UserError(
            f"no GPU for local rank {local_rank} (torch sees {torch.cuda.device_count()})",
            where="resources.device",
            mend="use fewer processes, or resources.device=cpu",
        )
    everyone = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (
        torch.device("cuda", local_rank) if device == "cuda" or (device == "auto" and everyone) else torch.device("cpu")
    )
