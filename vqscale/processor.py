"""What the processor of this machine computes with."""

from __future__ import annotations

from functools import cache
from pathlib import Path

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names that Linux has for units that multiply bf16: two of x86, one of Arm."""


@cache
def has_bf16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the processor multiplies bf16 by itself.

    Without such units torch computes bf16 by way of fp32, several times slower than fp32 (docs/log.md).

    Args:
        cpuinfo: file in which Linux says what the processor has.
    """
    lines = Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not BF16_FLAGS.isdisjoint(flags.partition(":")[2].split())
