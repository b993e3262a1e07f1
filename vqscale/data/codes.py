"""Code shards: the code grids of one image shard as a WebDataset tar of blocks, and a source for the loader.

A block holds up to `extract.block` samples: `00000.bottom.npy` and `00000.top.npy` (uint16 [n, side, side],
by level name), `00000.label.npy` (int32 [n]) and `00000.keys.json` (the samples' keys). Beside each finished
shard stands a record, so that an extraction that was killed goes on where it was; the manifest is made of the
records.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vqscale import storage
from vqscale.data import tar
from vqscale.data.bad import BadPick
from vqscale.data.manifest import CODES, CodeLevel, Manifest, Shard, hash_bytes
from vqscale.data.shards import ShardSet
from vqscale.data.source import Fields, Spec, read_in_batches
from vqscale.errors import UserError
from vqscale.storage.store import Store


@dataclass(frozen=True)
class CodeBlock:
    """Code grids of some consecutive samples."""

    codes: dict[str, NDArray[Any]]
    """Level name → integers [n, side, side] from 0 to 65,535."""
    labels: NDArray[Any]
    """Integers [n]; -1 for none."""
    keys: Sequence[str]
    """Key of each sample in its image shard."""


class CodeRecord(BaseModel):
    """What is known of one finished code shard; `NAME.json` beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard
    """Name, samples, bytes and hash."""
    fingerprint: str = ""
    """Identity of the tokenizer."""
    skipped: int = 0
    """Bad images that have no codes."""
    bad: tuple[tuple[str, str], ...] = ()
    """Key and kind of each of them."""
    usage: dict[str, list[int]] = {}
    """Level name → how often each code was used."""


def write_code_shard(url: str | Path, blocks: Iterable[CodeBlock]) -> Shard:
    """Write a code shard under its final name, whole or not at all; equal blocks give equal bytes.

    Args:
        url: folder and name of the shard.
        blocks: in the order of the samples.

    Raises:
        UserError: codes that do not fit in 16 bits, or arrays of unequal length.
    """
    file, samples = io.BytesIO(), 0

    def members() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal samples
        for number, block in enumerate(blocks):
            yield f"{number:05d}", _pack_block(block, str(url))
            samples += len(block.keys)

    tar.write(file, members())
    content = file.getvalue()
    storage.write_bytes(url, content)
    return Shard(name=str(url).rpartition("/")[2], samples=samples, bytes=len(content), sha256=hash_bytes(content))


def read_code_shard(url: str | Path) -> Fields:
    """All of a code shard.

    Returns:
        Level name → uint16 [n, side, side], and `label` int64 [n].

    Raises:
        UserError: it is absent, damaged, or no code shard.
    """
    return _read(storage.open_shard(url), str(url))[0]


def write_record(folder: str, record: CodeRecord) -> None:
    """Record that a code shard is finished."""
    text = json.dumps(record.model_dump(mode="json")) + "\n"
    storage.write_bytes(_record_url(folder, record.shard.name), text.encode())


def read_record(folder: str, name: str, fingerprint: str = "") -> CodeRecord | None:
    """The record of a finished code shard.

    Returns:
        None when the shard has to be written: no record, no such file or one of another size, or written by
        another tokenizer than `fingerprint` names.
    """
    where = _record_url(folder, name)
    if storage.size(where) is None:
        return None
    try:
        record = CodeRecord.model_validate_json(storage.read_bytes(where))
    except ValueError:
        return None
    whole = storage.size(storage.join(folder, name)) == record.shard.bytes
    return record if whole and record.fingerprint == fingerprint else None


def read_records(folder: str, names: Sequence[str], fingerprint: str) -> list[CodeRecord]:
    """The records of all shards, in the order of `names`.

    Raises:
        UserError: a shard is not recorded.
    """
    records = []
    for name in names:
        record = read_record(folder, name, fingerprint)
        if record is None:
            where = storage.join(folder, name)
            raise UserError("code shard is not finished", where=where, mend="run the extraction again")
        records.append(record)
    return records


def manifest_from_records(
    records: Sequence[CodeRecord],
    *,
    levels: Sequence[CodeLevel],
    classes: Sequence[str],
    image_size: int | None,
    fingerprint: str,
    source: dict[str, Any],
) -> Manifest:
    """The manifest of a finished extraction; the caller writes it.

    Args:
        records: of all shards, in the order of the image shards.
        levels: from the finest to the coarsest.
        classes: names of the labels.
        image_size: side of the encoded images.
        fingerprint: the tokenizer's.
        source: where the images came from.
    """
    return Manifest(
        format=CODES,
        shards=tuple(record.shard for record in records),
        classes=tuple(classes),
        image_size=image_size,
        skipped=sum(record.skipped for record in records),
        levels=tuple(levels),
        fingerprint=fingerprint,
        source=source,
    )


class CodeSource:
    """Code shards.

    Fields: for each level its name, uint16 [side, side], and `label` int64 (-1 for none).

    Args:
        shards: the shards.
        store: opens them.
    """

    def __init__(self, shards: ShardSet, store: Store | None = None) -> None:
        manifest = shards.manifest
        if manifest.format != CODES:
            raise UserError(
                f"holds {manifest.format}, not codes", where=shards.spec, mend="name a folder of code shards"
            )
        self.shards, self.manifest, self.store = shards, manifest, store or Store()
        self.spec = {level.name: Spec((level.grid, level.grid), np.dtype(np.uint16)) for level in manifest.levels}
        self.spec["label"] = Spec((), np.dtype(np.int64))

    def name(self, shard: int) -> str:
        """Name of a shard in messages."""
        return self.shards.name(shard)

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Size of some shards together."""
        return sum(self.manifest.shards[shard].bytes for shard in shards)

    def open_group(self, shards: Sequence[int]) -> CodeGroup:
        """Read shards into memory."""
        read = [self._read(shard) for shard in shards]
        fields = {name: np.concatenate([part[0][name] for part in read]) for name in self.spec}
        return CodeGroup(fields, [key for part in read for key in part[1]])

    def read_shard(
        self, shard: int, batch: int, bad: list[BadPick] | None = None
    ) -> Iterator[tuple[Fields, list[str]]]:
        """The samples of a shard in order, as (fields, keys) of up to `batch` samples."""
        return read_in_batches(self, shard, self.manifest.counts[shard], batch, bad)

    def _read(self, shard: int) -> tuple[Fields, list[str]]:
        where, stated = self.shards.urls[shard], self.manifest.shards[shard]
        fields, keys = _read(self.store.open(where, sha256=stated.sha256, size=stated.bytes), where)
        expected = stated.samples
        shapes = {name: (expected, *spec.shape) for name, spec in self.spec.items()}
        if {name: array.shape for name, array in fields.items()} != shapes:
            raise _wrong(where, "its arrays differ from what the manifest says")
        return fields, keys


class CodeGroup:
    """Codes of some shards in memory, numbered through."""

    def __init__(self, fields: Fields, keys: list[str]) -> None:
        self._fields, self._keys = fields, keys

    def keys(self, picks: NDArray[np.int64]) -> list[str]:
        """Keys of samples by number within the group."""
        return [self._keys[pick] for pick in picks.tolist()]

    def read(self, picks: NDArray[np.int64], out: Fields, row: int) -> list[BadPick]:
        """Gather samples into the rows from `row` on; codes cannot be bad one by one."""
        for name, array in self._fields.items():
            out[name][row : row + len(picks)] = array[picks]
        return []


def _record_url(folder: str, name: str) -> str:
    return storage.join(folder, f"{name}.json")


def _pack_block(block: CodeBlock, where: str) -> dict[str, bytes]:
    arrays = {name: _narrow(codes, where) for name, codes in block.codes.items()}
    arrays["label"] = np.ascontiguousarray(block.labels, np.int32)
    if {len(array) for array in arrays.values()} != {len(block.keys)}:
        raise _wrong(where, "codes, labels and keys of a block differ in number")
    fields = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
    return {**fields, "keys.json": json.dumps(list(block.keys)).encode()}


def _narrow(codes: NDArray[Any], where: str) -> NDArray[np.uint16]:
    codes = np.asarray(codes)
    if codes.size and (codes.min() < 0 or codes.max() > 0xFFFF):
        raise _wrong(where, "codes lie outside 0 to 65,535")
    return np.ascontiguousarray(codes, np.uint16)


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _read(buffer: storage.Buffer, where: str) -> tuple[Fields, list[str]]:
    blocks: dict[str, list[NDArray[Any]]] = {}
    keys: list[str] = []
    try:
        for sample in tar.samples(buffer, where):
            for extension, (offset, size) in sample.fields.items():
                content = buffer[offset : offset + size]
                if extension == "keys.json":
                    keys.extend(json.loads(content))
                elif extension.endswith(".npy"):
                    array = np.load(io.BytesIO(content), allow_pickle=False)
                    blocks.setdefault(extension.removesuffix(".npy"), []).append(array)
        fields = {name: np.concatenate(parts) for name, parts in blocks.items()}
    except ValueError as error:
        raise _wrong(where, f"is damaged ({error})") from None
    if "label" not in fields or {len(array) for array in fields.values()} != {len(keys)}:
        raise _wrong(where, "is no code shard")
    fields["label"] = fields["label"].astype(np.int64)
    return fields, keys


def _wrong(where: str, what: str) -> UserError:
    return UserError(what, where=where, mend="extract the codes again")
