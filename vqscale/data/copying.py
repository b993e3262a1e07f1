"""Code shards from one place to another: compared with their hashes on the way, and resumable.

A shard is written whole and then recorded, as an extraction does it; the manifest comes last. So a copy that was
killed goes on with the shards that have no valid record, and a folder with a manifest is complete.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vqscale import storage
from vqscale.data.code_records import CodeRecord, stored_record, write_record
from vqscale.data.manifest import CODES, MANIFEST, Manifest, Shard, read_manifest, write_manifest
from vqscale.data.shards import ShardSet, open_shards
from vqscale.data.threads import THREADS, in_threads
from vqscale.data.verify import shard_fault
from vqscale.errors import UserError

SPLITS = ("train", "validation")
"""Folders of code shards below a folder such as `RUN/codes`."""

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_AGAIN = "copy it again, or extract the codes again"


@dataclass(frozen=True)
class Copied:
    """What a copy has come to."""

    manifest: Manifest
    """What the target holds now."""
    shards: int
    """Shards that were copied; the others were there."""
    bytes: int
    """Their bytes."""


def code_folders(url: str) -> dict[str, str]:
    """Folders of code shards by split: `url` itself under the name ``""``, or `train` and `validation` below it."""
    if storage.size(storage.join(url, MANIFEST)) is None:
        below = {split: storage.join(url, split) for split in SPLITS}
        found = {split: one for split, one in below.items() if storage.size(storage.join(one, MANIFEST)) is not None}
        if found:
            return found
    return {"": url}


def open_codes(url: str) -> ShardSet:
    """The shards of a folder of codes.

    Raises:
        UserError: as `open_shards`; also where they hold no codes, or lack a hash.
    """
    shards = open_shards(url)
    if shards.manifest.format != CODES:
        raise UserError(f"holds {shards.manifest.format}, not codes", where=shards.spec, mend="name code shards")
    for shard in shards.manifest.shards:
        if not shard.sha256:
            raise UserError(f"states no sha256 of {shard.name}", where=shards.spec, mend="extract the codes again")
    return shards


def choose(total: int, *, ranges: str = "", fraction: float | None = None) -> list[int]:
    """Numbers of the shards that were asked for, in ascending order; all by default.

    Args:
        total: how many there are.
        ranges: such as `0-99` or `0-9,20`.
        fraction: so many of the first shards, rounded up; a larger fraction holds a smaller one.

    Raises:
        UserError: no such shards.
    """
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise UserError(f"{fraction} is no part of the shards", where="--fraction", mend="use 0.1, for a tenth")
        return list(range(math.ceil(fraction * total)))
    chosen: set[int] = set()
    for part in ranges.split(",") if ranges else ():
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < total:
            mend = f"there are {total} shards, 0 to {total - 1}; write 0-9 or 0-9,20"
            raise UserError(f"'{part.strip()}' names no shards", where="--shards", mend=mend)
        chosen.update(range(first, last + 1))
    return sorted(chosen) if ranges else list(range(total))


def copy_codes(
    shards: ShardSet,
    target: str,
    numbers: Sequence[int],
    *,
    threads: int = THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> Copied:
    """Copy some shards into a folder; those that are there already stay.

    Args:
        shards: what `open_codes` gave.
        target: folder or URL.
        numbers: which shards.
        threads: shards that are copied at the same time; remote ones lie in memory meanwhile.
        progress: called with bytes done and bytes in all.

    Raises:
        UserError: the target holds other codes, or a shard is absent, cut off, or not what the manifest says.
    """
    held = _held(shards.manifest, target)
    chosen = [shards.manifest.shards[number] for number in numbers]
    done = copied = written = 0
    total = sum(shard.bytes for shard in chosen)
    for shard, new in zip(chosen, in_threads(_Copy(shards, target), numbers, threads), strict=True):
        done, copied, written = done + shard.bytes, copied + new, written + new * shard.bytes
        if progress:
            progress(done, total)
    wanted = {shard.name for shard in (*chosen, *held)}
    kept = tuple(shard for shard in shards.manifest.shards if shard.name in wanted)
    manifest = shards.manifest.model_copy(update={"shards": kept, "base": ""})
    write_manifest(target, manifest)
    _sweep(target, kept)
    return Copied(manifest, copied, written)


class _Copy:
    """Copies one shard at a call; says whether it had to."""

    def __init__(self, shards: ShardSet, target: str) -> None:
        self._shards, self._target = shards, target

    def __call__(self, number: int) -> bool:
        manifest, url = self._shards.manifest, self._shards.urls[number]
        shard = manifest.shards[number]
        if self._finished(shard):
            return False
        content = _read(url, shard, manifest)[:]
        storage.write_bytes(storage.join(self._target, shard.name), content)
        theirs = stored_record(url.removesuffix(f"/{shard.name}"), shard.name)
        ours = CodeRecord(shard=shard, fingerprint=manifest.fingerprint)
        same = theirs is not None and (theirs.shard, theirs.fingerprint) == (ours.shard, ours.fingerprint)
        write_record(self._target, theirs if theirs is not None and same else ours)
        return True

    def _finished(self, shard: Shard) -> bool:
        """Whether a shard is at the target: recorded, of its size, and where it is local also with its hash."""
        where, manifest = storage.join(self._target, shard.name), self._shards.manifest
        record = stored_record(self._target, shard.name)
        if record is None or (record.shard, record.fingerprint) != (shard, manifest.fingerprint):
            return False
        if storage.local_path(where) is None:
            return storage.size(where) == shard.bytes
        return storage.size(where) is not None and not shard_fault(storage.open_shard(where), shard, manifest, where)


def _read(url: str, shard: Shard, manifest: Manifest) -> storage.Buffer:
    """A shard that is as its manifest says; one that is not, is read a second time where it came over a network."""
    for _ in range(1 if storage.local_path(url) else 2):
        buffer = storage.open_shard(url)
        fault = shard_fault(buffer, shard, manifest, url)
        if not fault:
            return buffer
    raise UserError(fault, where=storage.shown(url), mend=_AGAIN)


def _held(manifest: Manifest, target: str) -> tuple[Shard, ...]:
    """The shards of a target's own manifest, which have to be of the same codes.

    Raises:
        UserError: they are others.
    """
    if storage.size(storage.join(target, MANIFEST)) is None:
        return ()
    theirs, mend = read_manifest(target), "name another folder, or remove this one"
    if theirs.fingerprint != manifest.fingerprint:
        raise UserError("holds codes of another tokenizer", where=storage.shown(target), mend=mend)
    strange = [shard.name for shard in theirs.shards if shard not in manifest.shards]
    if strange or theirs.levels != manifest.levels:
        what = f"holds other codes ({strange[0]})" if strange else "holds codes of other levels"
        raise UserError(what, where=storage.shown(target), mend=mend)
    return theirs.shards


def _sweep(target: str, shards: Sequence[Shard]) -> None:
    """Remove what killed copies left beside local shards."""
    folder = storage.local_path(target)
    for shard in shards if folder else ():
        path = Path(str(folder), shard.name)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
            with suppress(FileNotFoundError):
                left.unlink()
