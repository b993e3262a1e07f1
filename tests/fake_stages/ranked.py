"""A stage of real ranks: `torchrun -m tests.fake_stages.ranked --run RUN`; hangs when RUN/hang is there."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from vqscale.config.layout import RunLayout
from vqscale.files import write_bytes, write_json


def main() -> None:
    layout = RunLayout(Path(sys.argv[sys.argv.index("--run") + 1]))
    dist.init_process_group("gloo")
    rank, total = dist.get_rank(), torch.ones(())
    dist.all_reduce(total)
    print(f"rank {rank} of {int(total)}")
    if (layout.root / "hang").exists():
        write_bytes(layout.stage("generate") / f"pid-{rank}", str(os.getpid()).encode())
        time.sleep(600)
    dist.barrier()
    if rank == 0:
        write_json(layout.done("generate"), {"world": int(total), "threads": os.environ["OMP_NUM_THREADS"]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
