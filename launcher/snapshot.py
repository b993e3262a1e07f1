"""The code's identity and the surroundings of a run, in RUN/code/. No secrets: names are allow-listed."""

from __future__ import annotations

import fnmatch
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.preflight.packages import installed
from vqscale.files import write_bytes, write_json
from vqscale.sources import ROOMS, sources_hash

RECORDED = (
    "PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LANG", "LC_*",
    "CUDA_*", "NVIDIA_*", "NCCL_*", "GLOO_*", "TORCH_*", "OMP_*", "MKL_*",
)  # fmt: skip
"""Environment variables that are written down."""

_SECRET = ("*KEY*", "*TOKEN*", "*SECRET*", "*PASS*", "*CREDENTIAL*")
_GIT_TIMEOUT_S = 10


def write_snapshot(source: Path, target: Path) -> None:
    """Record commit, uncommitted work, versions and environment.

    Args:
        source: folder of the packages; a git work tree, or an installation.
        target: folder to write into (`RunLayout.code`).
    """
    commit = _git(source, "rev-parse", "HEAD")
    inside = _git(source, "rev-parse", "--is-inside-work-tree") is not None
    identity: dict[str, Any] = {
        "source": str(source),
        "commit": commit.strip() if commit else None,
        "sources_sha256": sources_hash(source),
        "uncommitted": None,
        "untracked": [],
    }
    if inside:
        diff = _git(source, "diff", "--binary", "HEAD" if commit else "--cached", "--", *ROOMS) or ""
        identity["uncommitted"] = bool(diff)
        identity["untracked"] = _copy_untracked(source, target / "untracked")
        write_bytes(target / "uncommitted.diff", diff.encode(errors="surrogateescape"))
    write_json(target / "identity.json", identity)
    write_json(target / "environment.json", surroundings())


def surroundings() -> dict[str, Any]:
    """Python, machine, package versions, and the variables that may matter."""
    return {
        "python": sys.version,
        "executable": sys.executable,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": dict(sorted(installed().items())),
        "variables": {name: value for name, value in sorted(os.environ.items()) if _recorded(name)},
    }


def _copy_untracked(source: Path, target: Path) -> list[str]:
    """A diff leaves out files that git does not know yet; code among them is copied."""
    listing = _git(source, "ls-files", "-z", "--others", "--exclude-standard", "--", *ROOMS) or ""
    names = sorted(name for name in listing.split("\0") if Path(name).suffix in (".py", ".yaml"))
    for name in names:
        write_bytes(target / name, (source / name).read_bytes())
    return names


def _recorded(name: str) -> bool:
    secret = any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in _SECRET)
    return not secret and any(fnmatch.fnmatchcase(name, pattern) for pattern in RECORDED)


def _git(source: Path, *arguments: str) -> str | None:
    """Output of git; None when there is no git, no repository, or no answer in time."""
    try:
        done = subprocess.run(
            ["git", "-C", str(source), *arguments],
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="surrogateescape")
