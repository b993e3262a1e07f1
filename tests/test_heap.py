"""Main memory of training on a CPU: kept, in huge pages, and by this process alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import os, resource, torch
from vqscale.training.heap import keep_heap
if {keep}:
    keep_heap()
values = torch.ones(2**24)
huge = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")).split()[1]
del values
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, huge, "THP_MEM_ALLOC_ENABLE" in os.environ)
"""


def measure(*, keep: bool) -> tuple[int, int, bool]:
    """Page faults of 20 blocks of 64 MiB after the first, KiB in huge pages during it, and the switch's presence."""
    command = [sys.executable, "-c", MEASURE.format(keep=keep)]
    faults, huge, left = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(faults), int(huge), left == "True"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not say how pages are used")
def test_memory_is_kept_and_children_inherit_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    usual, kept = measure(keep=False), measure(keep=True)
    assert kept[0] < usual[0] / 4
    assert not kept[2]
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.exists() and "[madvise]" in pages.read_text():
        assert kept[1] >= 32 * 1024 > usual[1]
