"""Whether shards are what their manifest says: size, hash, the number of samples, and on request every image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from vqscale import storage
from vqscale.data import tar
from vqscale.data.bad import BadPick
from vqscale.data.codes import OpenCodes, check_index
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import CODES, IMAGES, Manifest, Shard, hash_bytes
from vqscale.data.shards import ShardSet
from vqscale.data.threads import THREADS, in_threads
from vqscale.errors import UserError
from vqscale.storage.store import Store

_SIDE = 64  # images of unknown size are decoded to this many pixels; libjpeg reads all of a file at any
_BATCH = 64


def verify(
    shards: ShardSet,
    progress: Callable[[Shard], None] | None = None,
    *,
    bad: list[BadPick] | None = None,
    threads: int = THREADS,
) -> list[str]:
    """Read every shard and compare it with the manifest: size, hash where there is one, and the number of samples.

    Args:
        shards: what to read.
        progress: called after each shard.
        bad: with a list, every sample is decoded as for training, and those that are bad are added to it.
        threads: shards that are read at the same time.

    Returns:
        One line for each fault; empty when all is well.
    """
    faults = []
    check = partial(_check, shards, bad is not None and shards.manifest.format == IMAGES)
    checked = in_threads(check, range(len(shards.urls)), threads)
    for shard, (fault, found) in zip(shards.manifest.shards, checked, strict=True):
        if fault:
            faults.append(f"{shard.name}: {fault}")
        if bad is not None:
            bad.extend(found)
        if progress:
            progress(shard)
    return faults


def _check(shards: ShardSet, decode: bool, number: int) -> tuple[str, list[BadPick]]:
    """What is wrong with a shard, and its bad samples."""
    where, shard = shards.urls[number], shards.manifest.shards[number]
    if storage.size(where) is None:
        return "is missing", []
    try:
        buffer = storage.open_shard(where)
    except UserError as error:
        return error.what, []
    fault = shard_fault(buffer, shard, shards.manifest, where)
    return fault, _bad_samples(shards, number, buffer) if decode else []


def shard_fault(buffer: storage.Buffer, shard: Shard, manifest: Manifest, where: str) -> str:
    """What is wrong with the content of a shard, in one line; empty when it is as its manifest says."""
    if len(buffer) < shard.bytes:
        return f"is cut off: it has {len(buffer)} bytes, the manifest says {shard.bytes}"
    if len(buffer) > shard.bytes:
        return f"has {len(buffer)} bytes, the manifest says {shard.bytes}"
    if shard.sha256 and hash_bytes(buffer) != shard.sha256:
        return "its content has another sha256 than the manifest says"
    try:
        if manifest.format == CODES:
            check_index(OpenCodes(buffer, where).index, manifest, shard.samples, where)
            return ""
        samples = len(tar.samples(buffer, where))
    except UserError as error:
        return error.what
    return "" if samples == shard.samples else f"holds {samples} samples, the manifest says {shard.samples}"


def _bad_samples(shards: ShardSet, number: int, buffer: storage.Buffer) -> list[BadPick]:
    """Decode what training would decode; nothing where the shard is another one than the manifest says."""
    side = shards.manifest.image_size or _SIDE
    source = ImageSource(shards, side, _Opened(buffer))
    try:
        group = source.open_group([number])
    except UserError:
        return []
    total = shards.manifest.shards[number].samples
    out = {name: spec.empty(_BATCH) for name, spec in source.spec.items()}
    starts = range(0, total, _BATCH)
    return [bad for start in starts for bad in group.read(np.arange(start, min(total, start + _BATCH)), out, 0)]


class _Opened(Store):
    """Hands out a shard that is open already, so that a remote one is read once."""

    def __init__(self, buffer: storage.Buffer) -> None:
        super().__init__()
        self._buffer = buffer

    def open(self, url: str, *, sha256: str = "", size: int | None = None) -> storage.Buffer:
        """The shard."""
        return self._buffer
