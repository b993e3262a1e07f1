"""A process group of this process alone, for benchmarks that run the real engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from vqscale.training.distributed import Ranks, process_group


@contextmanager
def one_process() -> Iterator[Ranks]:
    """Join it, on the GPU if there is one; the environment is put back afterwards."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    # Port 0 is any free one. Accelerate sets torch's threads where their number is not given.
    world = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    before = {name: os.environ.get(name) for name in world}
    os.environ.update(world)
    try:
        with process_group() as ranks:
            yield ranks
    finally:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()  # it would outlive the group
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
