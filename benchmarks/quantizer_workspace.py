"""How much memory the nearest-code search needs besides what it is given and gives back.

By the peak resident memory of a process of its own: it sees what every library allocates, torch and oneDNN included.

    python -m benchmarks.quantizer_workspace VECTORS CODES DIM THREADS
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch

from vqscale.models.nearest import assign


def measure(vectors: int, codes: int, dim: int, threads: int) -> float:
    """Bytes at the peak of `assign` with statistics, less its results, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.quantizer_workspace", *map(str, (vectors, codes, dim, threads))]
    root = Path(__file__).resolve().parents[1]
    return float(subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _grown(vectors: int, codes: int, dim: int, threads: int) -> float:
    torch.set_num_threads(threads)
    z, book = torch.randn(vectors, dim), torch.randn(codes, dim)
    assign(z[:64], book[:16], statistics=True)  # loads code and starts threads, with buffers that are small
    room = np.ones(max(0, _peak() - psutil.Process().memory_info().rss), np.uint8)  # so that growth shows at once
    before = _peak()
    found = assign(z, book, statistics=True)
    grown = _peak() - before
    assert room.all()
    return float(grown - sum(part.nbytes for part in vars(found).values()))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(_grown(*map(int, sys.argv[1:])))
