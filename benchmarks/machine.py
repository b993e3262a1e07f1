"""Facts about the machine, the code and the packages that a result needs to be judged by."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from benchmarks.result import Commit, Load, Machine
from benchmarks.timing import cpu_seconds

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vqscale", "numpy", "torch")
"""Packages whose version every result has."""

_FLAGS = (
    *("avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve", "sve2"),
)
_WIDEST = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve2", "sve", "asimd")
"""Units for products, best first: without them the name of a virtual machine's processor says little."""


def machine() -> Machine:
    """This machine; asks torch for accelerators."""
    import torch

    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    cpu = _first(r"^model name\s*: (.+)$", text) or platform.machine()
    cores = len(os.sched_getaffinity(0))
    present = set(_first(r"^(?:flags|Features)\s*: (.+)$", text).split())
    gpus = tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    flags = tuple(flag for flag in _FLAGS if flag in present)
    return Machine(
        name=_slug(cpu, flags, cores, gpus),
        cpu=cpu,
        cores=cores,
        flags=flags,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=gpus,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else ""


def _slug(cpu: str, flags: Sequence[str], cores: int, gpus: Sequence[str]) -> str:
    widest = next((flag for flag in _WIDEST if flag in flags), "")
    words = [cpu, widest, f"{cores}-cores", *(f"{gpus.count(gpu)}-{gpu}" for gpu in dict.fromkeys(gpus))]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed, and of Python."""
    found = {"python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, *packages)):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a peer; that it was left out stands in `skipped`
    return found


def commit(root: Path = ROOT) -> Commit:
    """The commit of a work tree, and whether it has changes."""
    head = _git(root, "rev-parse", "HEAD")
    return Commit(id=head, dirty=bool(head and _git(root, "status", "--porcelain")))


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class LoadWatch:
    """Watches what else the machine does from its making until `finish`."""

    def __init__(self) -> None:
        self._before = os.getloadavg()
        self._began, self._busy, self._own = time.perf_counter(), _busy_seconds(), cpu_seconds()

    def finish(self) -> Load:
        """The load until now."""
        seconds, cores = time.perf_counter() - self._began, len(os.sched_getaffinity(0))
        others = (_busy_seconds() - self._busy) - (cpu_seconds() - self._own)
        return load(self._before, os.getloadavg(), cores, others / seconds)


def load(before: tuple[float, float, float], after: tuple[float, float, float], cores: int, others: float) -> Load:
    """The record, with its flag."""
    return Load(
        before=_rounded(before),
        after=_rounded(after),
        above_cores=max(before[0], after[0]) > cores,
        others=round(max(0.0, others), 2),
    )


def _rounded(averages: tuple[float, float, float]) -> tuple[float, float, float]:
    one, five, fifteen = averages
    return round(one, 2), round(five, 2), round(fifteen, 2)


def _busy_seconds() -> float:
    """Seconds that all cores together have worked since the machine was started, for processes of any user."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
