"""How a checkpoint comes into being: its files first, synced; then the manifest, which makes it one; then old ones go.

On a local disk all of it is written into a folder beside, `.step-00000250.TOKEN`, which is renamed at the end. Object
stores have no rename: there the files are uploaded where they belong, and the upload of the manifest is the commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale import storage
from vqscale.checkpoint.folder import remove, step_name, step_url, unfinished
from vqscale.checkpoint.manifest import MANIFEST, FileRecord, Manifest
from vqscale.errors import UserError

_BLOCK = 32 << 20  # bytes that are written in one go


@dataclass(frozen=True)
class Attempt:
    """A save under way.

    `begin` on rank 0, then `write` on any rank, then on rank 0, when all have written, `commit` or `abandon`. What goes
    wrong is an `OSError` or, for URLs, a `UserError`.
    """

    where: str
    """The stage's checkpoints."""
    step: int
    token: str
    """Of this save alone, so that what another one left is not taken for its own."""

    @property
    def _beside(self) -> Path | None:
        """Where local files are written; None for URLs."""
        path = storage.local_path(self.where)
        return path and path / f".{step_name(self.step)}.{self.token}"

    def begin(self) -> None:
        """Make room: saves that were killed are cleared away, and on object stores what this step had before."""
        for path in unfinished(self.where):
            shutil.rmtree(path)
        if self._beside:
            self._beside.mkdir(parents=True)
        else:
            remove(self.where, self.step)

    def write(self, name: str, data: bytes | memoryview) -> FileRecord:
        """Write and sync one file, and hash it meanwhile: what is hashed is the memory, not what a disk made of it."""
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(hashlib.sha256, data)
            if self._beside:
                _write(self._beside / name, memoryview(data))
            else:
                storage.write_bytes(storage.join(step_url(self.where, self.step), name), bytes(data))
        return FileRecord(bytes=len(data), sha256=digest.result().hexdigest())

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, and give the checkpoint its name."""
        self.write(MANIFEST, manifest.encode())
        if self._beside:
            _sync(self._beside)
            _put_in_place(self._beside, self._beside.parent / step_name(self.step))

    def abandon(self) -> None:
        """Take away what was written; whatever keeps it from that is left to the next save."""
        with suppress(OSError, UserError):
            if self._beside:
                shutil.rmtree(self._beside, ignore_errors=True)
            else:
                remove(self.where, self.step)


def encode_state(state: dict[str, Any]) -> bytes:
    """Plain values as they stand in `state.json`."""
    return (json.dumps(state, indent=1, sort_keys=True) + "\n").encode()


def _put_in_place(beside: Path, final: Path) -> None:
    replaced = final.with_name(f"{beside.name}.replaced")
    if final.exists():  # damaged, or the run would not have come to this step again
        final.rename(replaced)
    beside.rename(final)
    for folder in (final.parent, *final.absolute().parents[1:3]):  # the first checkpoint's are new themselves
        _sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _write(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        while len(data):
            data = data[file.write(data[:_BLOCK]) :]
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
