"""The identity of the code that runs, whether git knows it or not."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOMS = ("launcher", "vqscale", "pipelines", "cluster")
"""Packages whose code decides what a run does."""


def sources_hash(source: Path) -> str:
    """SHA-256 over names and contents of all code and settings; also tells installed copies apart.

    Args:
        source: folder of the packages.
    """
    digest = hashlib.sha256()
    for path in _sources(source):
        digest.update(f"{path.relative_to(source)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _sources(source: Path) -> list[Path]:
    found = [path for room in ROOMS for path in (source / room).rglob("*") if path.suffix in (".py", ".yaml")]
    return sorted(path for path in found if path.is_file())
