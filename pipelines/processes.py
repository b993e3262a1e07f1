"""Commands that do the work of a stage outside of a run: in one process, or as ranks of their own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vqscale.training.distributed import Ranks, choose_device, process_group

_TIMEOUT_S = 24 * 3600  # in a collective: a rank may have done its share long before another


@dataclass(frozen=True)
class Alone:
    """One process without a process group, as `Ranks`."""

    device: torch.device
    rank, world, first = 0, 1, True

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Nothing to add."""
        return tensor


@contextmanager
def ranks_of(device: str) -> Iterator[Ranks | Alone]:
    """The ranks that the environment describes; without any, this process alone.

    Args:
        device: `auto`, `cpu` or `cuda`.
    """
    if "RANK" in os.environ:
        with process_group(device, _TIMEOUT_S) as ranks:
            yield ranks
    else:
        yield Alone(choose_device(device))


def launch(module: str, processes: int, words: Sequence[str]) -> int:
    """A program as so many ranks on this machine; returns the exit code of the first that failed.

    Args:
        module: the program.
        processes: how many.
        words: its command line.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    config = LaunchConfig(
        *(1, 1, processes),
        run_id=f"vqscale-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", module, *words)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
