"""The disk under a folder: space, and how fast a file is written and synced."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.preflight.verdict import Verdict, at_least, expect

_FREE_GB = 10.0


@dataclass(frozen=True)
class Folder:
    """What a folder's disk can do, as seen from one machine."""

    path: str
    free: int
    """Bytes."""
    write_mb_s: float
    """MB/s of one file that is written and synced."""
    fault: str = ""
    """Why it could not be measured; the other figures are 0 then."""


def look_at_folder(folder: Path, name: str, megabytes: int = 64) -> Folder:
    """Write, sync and remove a file of random bytes; a compressing file system is not flattered.

    Args:
        folder: where; it has to be there.
        name: of the file, different on every machine.
        megabytes: its size in MB.
    """
    block, path = os.urandom(1 << 20), folder / name
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        took = time.perf_counter() - began
        free = shutil.disk_usage(folder).free
        path.unlink()
    except OSError as error:
        return Folder(str(folder), 0, 0.0, error.strerror or str(error))
    return Folder(str(folder), free, megabytes * len(block) / 1e6 / took)


def judge_folder(where: str, folder: Folder, floor: float | None) -> list[Verdict]:
    """Space and speed of the folder of runs."""
    mend = "choose another folder with $VQSCALE_RUNS"
    if folder.fault:
        return [Verdict("run folder", where, "FAIL", f"{folder.path}: {folder.fault}", mend=mend)]
    space = expect(
        "disk space",
        where,
        folder.free >= _FREE_GB * 1e9,
        f"{folder.free / 1e9:,.1f} GB free in {folder.path}",
        limit=f"at least {_FREE_GB:g} GB",
        mend=f"clear some (vqscale checkpoints prune), or {mend}",
        word="warn",
    )
    return [space, at_least("write and sync", where, folder.write_mb_s, floor, "MB/s", mend)]
