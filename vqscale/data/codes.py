"""Code shards, format `vqscale-codes/1`: WebDataset tars of blocks of compressed code grids, with an index.

The first member, `__index__`, says in JSON what the shard holds and where each block's members lie. A block holds up
to `extract.block` samples, and its members are zstd frames with a checksum: for each level `00000.LEVEL.zst`
(`code_planes.pack_codes`; of continuous latents the posteriors, float32 [n, 2C, side, side], little-endian),
`00000.label.zst` (int32 [n], little-endian) and `00000.keys.zst` (a list of the samples'
keys, JSON).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zstandard
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from vqscale import storage
from vqscale.data import tar
from vqscale.data.code_planes import pack_codes, unpack_codes
from vqscale.data.manifest import CODES, CodeLevel, Count, Manifest, Shard, hash_bytes
from vqscale.data.memory import aligned
from vqscale.data.source import Fields
from vqscale.errors import UserError

INDEX = "__index__"
"""Name of a shard's first member; webdataset passes such names by."""

_LEVEL = 3  # of zstd: level 9 saves 4 % of the bottom level and takes four times as long to pack
_LABELS, _KEYS = "label", "keys"
_LONGEST_KEY = 4_096  # bytes of JSON


@dataclass(frozen=True)
class CodeBlock:
    """Code grids of some consecutive samples."""

    codes: dict[str, NDArray[Any]]
    """Level name → integers [n, side, side] from 0 to 65,535, or posteriors float32 [n, 2C, side, side]."""
    labels: NDArray[Any]
    """Integers [n]; -1 for none."""
    keys: Sequence[str]
    """Key of each sample in its image shard."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockIndex(_Record):
    """Where the members of one block lie."""

    samples: Count
    """Samples of the block."""
    members: dict[str, tuple[Count, Count]]
    """Level name, `label` and `keys` → offset in bytes, counted from where the blocks begin, and size."""


class CodeIndex(_Record):
    """What a shard says of itself, in the member `__index__`."""

    format: Literal["vqscale-codes/1"] = "vqscale-codes/1"
    """The format."""
    fingerprint: str
    """Identity of the tokenizer."""
    levels: tuple[CodeLevel, ...]
    """Levels of the code grids, from the finest to the coarsest."""
    blocks: tuple[BlockIndex, ...]
    """In the order of the samples."""

    @property
    def samples(self) -> int:
        """Samples of all blocks."""
        return sum(block.samples for block in self.blocks)


def write_code_shard(
    url: str | Path, blocks: Iterable[CodeBlock], levels: Sequence[CodeLevel], fingerprint: str
) -> Shard:
    """Write a code shard under its final name, whole or not at all; equal blocks give equal bytes.

    Args:
        url: folder and name of the shard.
        blocks: in the order of the samples.
        levels: what the blocks hold, from the finest to the coarsest.
        fingerprint: the tokenizer's.

    Raises:
        UserError: codes that lie outside their codebook, or arrays of other shapes than the levels say.
    """
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    body: list[bytes] = []
    index: list[BlockIndex] = []
    position = 0
    for number, block in enumerate(blocks):
        spans = {}
        for name, content in _contents(block, levels, str(url)).items():
            packed = compressor.compress(content)
            head = tar.header(f"{number:05d}.{name}.zst", len(packed))
            spans[name] = (position + len(head), len(packed))
            body += [head, packed, bytes(-len(packed) % tar.BLOCK)]
            position += sum(map(len, body[-3:]))
        index.append(BlockIndex(samples=len(block.keys), members=spans))
    found = CodeIndex(fingerprint=fingerprint, levels=tuple(levels), blocks=tuple(index))
    told = found.model_dump_json().encode()
    content = b"".join([tar.header(INDEX, len(told)), told, bytes(-len(told) % tar.BLOCK), *body])
    content += tar.end_mark(len(content))
    storage.write_bytes(url, content)
    return Shard(
        name=str(url).rpartition("/")[2], samples=found.samples, bytes=len(content), sha256=hash_bytes(content)
    )


class OpenCodes:
    """A code shard that is open, and its index.

    Args:
        buffer: the whole shard.
        where: names it in errors.

    Raises:
        UserError: it is cut off, or no code shard of this format.
    """

    def __init__(self, buffer: storage.Buffer, where: str) -> None:
        self._buffer, self._where = buffer, where
        first = next(tar.members(buffer, where), None)
        if first is None or first.name != INDEX:
            raise wrong(where, f"is no code shard of format {CODES}")
        try:
            self.index = CodeIndex.model_validate_json(buffer[first.offset : first.offset + first.size])
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(map(str, fault["loc"]))
            raise wrong(where, f"has an index that is not of format {CODES} ({place}: {fault['msg']})") from None
        self._begin = first.offset + -(-first.size // tar.BLOCK) * tar.BLOCK

    def read(self, out: Fields, row: int) -> None:
        """Unpack all samples into the rows from `row` on: each level's [rows, *sample], `label` int64 [rows].

        Raises:
            UserError: the shard is damaged.
        """
        for block in self.index.blocks:
            self.read_block(block, {name: array[row : row + block.samples] for name, array in out.items()})
            row += block.samples

    def read_block(self, block: BlockIndex, out: Fields) -> None:
        """Unpack one block into arrays of its length; as `read`."""
        for level in self.index.levels:
            content = self._content(block, level.name, 2 * out[level.name].nbytes)
            try:
                _unpack(content, level, out[level.name])
            except ValueError as error:
                raise self._damaged(error) from None
        self._read_labels(block, out[_LABELS])

    def labels(self) -> NDArray[np.int64]:
        """Labels of all samples, int64 [samples]; unpacks nothing else. Raises as `read`."""
        out = np.empty(self.index.samples, np.int64)
        row = 0
        for block in self.index.blocks:
            self._read_labels(block, out[row : row + block.samples])
            row += block.samples
        return out

    def read_keys(self) -> list[str]:
        """Keys of all samples.

        Raises:
            UserError: the shard is damaged.
        """
        return [key for block in self.index.blocks for key in self.block_keys(block)]

    def block_keys(self, block: BlockIndex) -> list[str]:
        """Keys of a block's samples; as `read_keys`."""
        try:
            keys: list[str] = json.loads(self._content(block, _KEYS, _LONGEST_KEY * (block.samples + 1)))
        except ValueError as error:
            raise self._damaged(error) from None
        if len(keys) != block.samples:
            raise wrong(self._where, f"is damaged (a block of {block.samples} samples has {len(keys)} keys)")
        return keys

    def _read_labels(self, block: BlockIndex, out: NDArray[np.int64]) -> None:
        content = self._content(block, _LABELS, 4 * len(out))
        if len(content) != 4 * len(out):
            raise self._damaged(f"{len(content)} bytes do not hold {len(out)} labels")
        out[:] = np.frombuffer(content, "<i4")

    def _content(self, block: BlockIndex, name: str, limit: int) -> bytes:
        """A member, unpacked; its checksum is compared on the way. A frame that would fill the memory is refused."""
        offset, size = block.members.get(name, (0, 0))
        begin = self._begin + offset
        packed = memoryview(self._buffer)[begin : begin + size]  # no copy
        try:
            if not 0 <= zstandard.frame_content_size(packed) <= limit:
                raise self._damaged(f"a frame of {name} has no size, or more than {limit:,} bytes")
            return zstandard.decompress(packed)
        except zstandard.ZstdError as error:
            raise self._damaged(error) from None

    def _damaged(self, why: object) -> UserError:
        return wrong(self._where, f"is damaged ({why})")


def read_code_shard(url: str | Path) -> Fields:
    """All of a code shard.

    Returns:
        Level name → uint16 [n, side, side], or posteriors float32 [n, 2C, side, side]; and `label` int64 [n].

    Raises:
        UserError: it is absent, damaged, or no code shard.
    """
    shard = OpenCodes(storage.open_shard(url), str(url))
    fields = empty_fields(shard.index.levels, shard.index.samples)
    shard.read(fields, 0)
    return fields


def check_index(index: CodeIndex, manifest: Manifest, samples: int, where: str) -> None:
    """Compare what a shard says of itself with its manifest.

    Raises:
        UserError: they name different tokenizers, levels or numbers of samples.
    """
    if index.fingerprint != manifest.fingerprint:
        raise wrong(where, "holds codes of another tokenizer than its manifest says")
    if index.levels != manifest.levels:
        raise wrong(where, "holds other levels than its manifest says")
    if index.samples != samples:
        raise wrong(where, f"holds {index.samples} samples, its manifest says {samples}")


def empty_fields(levels: Sequence[CodeLevel], samples: int) -> Fields:
    """Memory for so many samples: each level's [samples, *sample], and `label` int64 [samples]."""
    fields: Fields = {level.name: aligned((samples, *level.sample), level.dtype) for level in levels}
    return {**fields, _LABELS: np.empty(samples, np.int64)}


def wrong(where: str, what: str) -> UserError:
    """The error about a code shard that cannot be used."""
    return UserError(what, where=storage.shown(where), mend="copy it again, or extract the codes again")


def _contents(block: CodeBlock, levels: Sequence[CodeLevel], where: str) -> dict[str, bytes]:
    """The members of a block before compression, by name."""
    count = len(block.keys)
    found = {}
    for level in levels:
        codes = block.codes[level.name]
        if codes.shape != (count, *level.sample) or len(block.labels) != count:
            raise wrong(where, f"codes of {level.name}, labels and keys of a block differ in number or shape")
        found[level.name] = _pack(codes, level, where)
    found[_LABELS] = np.ascontiguousarray(block.labels, "<i4").tobytes()
    return {**found, _KEYS: json.dumps(list(block.keys)).encode()}


def _pack(latents: NDArray[Any], level: CodeLevel, where: str) -> bytes:
    """A block's latents of one level before compression."""
    if level.continuous:
        if not np.isfinite(latents).all():
            raise wrong(where, f"posteriors of {level.name} are not finite")
        return np.ascontiguousarray(latents, "<f4").tobytes()
    if latents.size and (latents.min() < 0 or latents.max() >= level.codes):
        raise wrong(where, f"codes of {level.name} lie outside 0 to {level.codes - 1:,}")
    return pack_codes(latents, level.codes)


def _unpack(content: bytes, level: CodeLevel, out: NDArray[Any]) -> None:
    """The inverse, into contiguous memory.

    Raises:
        ValueError: there are more or fewer bytes than `out` has latents.
    """
    if not level.continuous:
        unpack_codes(content, level.codes, out)
    elif len(content) != out.nbytes:
        raise ValueError(f"{len(content)} bytes do not hold {out.size} numbers")
    else:
        out.reshape(-1)[:] = np.frombuffer(content, "<f4")
