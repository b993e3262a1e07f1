"""Ranks that meet and add up a tensor, as the stages do: `torchrun -m cluster.preflight.collective RESULT`.

The bandwidth is that of the bus, as nccl-tests has it: bytes a second times 2 (n - 1) / n for n ranks, so that it does
not depend on their number.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from vqscale.files import write_json

if TYPE_CHECKING:
    import torch

_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}
_ROUNDS = 5
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Meeting:
    """What became of the ranks' meeting."""

    world: int
    backend: str
    joined_s: float
    """Seconds until the process group stood, from the start of the process."""
    gb_s: float
    """Bus bandwidth of an all-reduce in GB/s, the median of five."""
    right: bool
    """Whether the sum was right on this rank."""


def main() -> None:
    """Entry of a rank; the first of each node writes its view of the meeting to the file that is named."""
    began = time.perf_counter()
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    backend = "nccl" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "gloo"
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=_TIMEOUT_S))
    joined = time.perf_counter() - began
    try:
        gb_s, right = _all_reduce(torch.ones(_BYTES[backend] // 4, device=device))
        meeting = Meeting(dist.get_world_size(), backend, joined, gb_s, right)
        if local == 0:
            write_json(Path(sys.argv[1]), asdict(meeting))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _all_reduce(tensor: torch.Tensor) -> tuple[float, bool]:
    """Bus bandwidth in GB/s, and whether a sum of ones is the number of ranks."""
    import torch
    import torch.distributed as dist

    world, times = dist.get_world_size(), []
    dist.all_reduce(tensor)  # the first one connects the ranks
    right = bool((tensor == world).all())
    for _ in range(_ROUNDS):
        tensor.fill_(1)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        right = right and bool((tensor == world).all())
    size = tensor.numel() * tensor.element_size()
    return size / statistics.median(times) * 2 * (world - 1) / world / 1e9, right


if __name__ == "__main__":
    main()
