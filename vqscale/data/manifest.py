"""The manifest of a folder of shards: how many samples each holds, its size and its hash.

`manifest.json` is written last, so a folder that has one is complete. Light on purpose (no numpy): the
launcher reads it before anything starts.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from vqscale import storage
from vqscale.errors import UserError

MANIFEST = "manifest.json"
IMAGES = "vqscale-images/1"
CODES = "vqscale-codes/1"

_AGAIN = "copy it again, or write the shards again"
_PACK = "write shards with `vqscale data pack SRC DEST --size S`"

Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Record):
    """One tar file."""

    name: str
    """Path below the manifest's folder (or `base`), with `/` between folders."""
    samples: Count
    """Images, or code grids, that it holds."""
    bytes: Count
    """Size of the file."""
    sha256: str
    """Hash of the file's content, in hexadecimal digits; empty where it was not computed."""

    @field_validator("name")
    @classmethod
    def _stays_inside(cls, name: str) -> str:
        if not name or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"shard name {name!r} leaves the manifest's folder")
        return name


class CodeLevel(_Record):
    """One level of a tokenizer's latents: a grid of codes, or of continuous latents whose posteriors are kept."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """Name of the level, such as `bottom`."""
    grid: Annotated[int, Field(ge=1)]
    """Side of the grid."""
    codes: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Codebook size; 0 where the latents are continuous."""
    channels: Count = 0
    """Channels C of continuous latents; 0 where there are codes."""

    @property
    def continuous(self) -> bool:
        """Whether there are posteriors in the place of codes."""
        return not self.codes

    @property
    def sample(self) -> tuple[int, ...]:
        """Shape of a sample: codes [grid, grid]; of posteriors [2C, grid, grid], means, then log deviations."""
        return (2 * self.channels, self.grid, self.grid) if self.continuous else (self.grid, self.grid)

    @property
    def dtype(self) -> str:
        """Of the arrays that hold samples, by its name in numpy."""
        return "float32" if self.continuous else "uint16"

    @property
    def values(self) -> int:
        """Latents of a sample."""
        return self.grid**2 * max(1, self.channels)

    @property
    def bytes(self) -> int:
        """Of a sample in such an array."""
        return 2 * self.grid**2 if self.codes else 8 * self.values

    @property
    def shape(self) -> str:
        """The level's shape in words."""
        return f"{self.grid}×{self.grid} of {self.channels or self.codes} {'channels' if self.channels else 'codes'}"

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"

    @model_validator(mode="after")
    def _codes_or_channels(self) -> Self:
        if self.codes == 1 or bool(self.codes) == bool(self.channels):
            raise ValueError(f"level {self.name!r} has {self.codes} codes and {self.channels} channels")
        return self

    @model_serializer(mode="wrap")
    def _without_what_codes_lack(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Of codes what has always been written of them."""
        tree: dict[str, Any] = plain(self)
        return tree if self.channels else {name: value for name, value in tree.items() if name != "channels"}


class Manifest(_Record):
    """What a folder of shards holds."""

    format: Literal["vqscale-images/1", "vqscale-codes/1"]
    """What the shards hold."""
    shards: tuple[Shard, ...]
    """In the order in which samples are numbered."""
    base: str = ""
    """Folder or URL below which the shards lie; empty when it is the manifest's own folder."""
    label: Annotated[str, Field(pattern=r"^(|none|cls|txt|folder(:[0-9])?|json:.+)$")] = ""
    """Where a sample's label is: `cls` or `txt` (a member of the sample), `json:KEY` (a value in its `.json`), `folder`
    (the first folder of its key; `folder:1` the one below it), or `none`. Numbers are labels, words are looked up in
    `classes`, -1 is none. Empty: `.cls`, else `label` in `.json`, else none."""
    classes: tuple[str, ...] = ()
    """Names of the labels 0, 1, ...; empty when the samples have none."""
    image_size: int | None = None
    """Side of the stored square images in pixels; None when they vary."""
    skipped: Count = 0
    """Unreadable files that were left out when the shards were written."""
    levels: tuple[CodeLevel, ...] = ()
    """Levels of the code grids, from the finest to the coarsest; empty for images."""
    fingerprint: str = ""
    """Identity of the tokenizer that wrote the codes; empty for images."""
    source: dict[str, Any] = {}
    """Where the samples came from and how they were written."""

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [shard.samples for shard in self.shards]


def read_manifest(url: str | Path) -> Manifest:
    """Read the manifest of a folder of shards.

    Raises:
        UserError: no such folder, an empty folder, no manifest, or one that is broken.
    """
    where = storage.join(url, MANIFEST)
    if storage.size(where) is None:
        raise no_manifest(str(url))
    return parse_manifest(where)


def parse_manifest(where: str) -> Manifest:
    """Read a manifest by its own path or URL.

    Raises:
        UserError: it is absent or broken.
    """
    try:
        return Manifest.model_validate(json.loads(storage.read_bytes(where)))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"is no valid manifest ({key}: {fault['msg']})", where=where, mend=_AGAIN) from None
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", where=where, mend=_AGAIN) from None


def no_manifest(url: str) -> UserError:
    """What to say of a folder without a manifest."""
    names = storage.list_names(url)
    if names is None:
        return UserError("no such folder", where=url, mend=f"check the path, or {_PACK}")
    if not names:
        return UserError("is an empty folder", where=url, mend=_PACK)
    splits = [storage.join(url, name) for name in ("train", "validation") if name in names]
    if splits:
        return UserError("holds no manifest.json itself", where=url, mend=f"name {' or '.join(splits)}")
    if any(name.endswith(".tar") for name in names):
        mend = f"where others wrote these shards: vqscale data index {url}; where `data pack` was stopped, pack again"
        return UserError("holds shards, but no manifest.json", where=url, mend=mend)
    return UserError("has neither manifest.json nor shards", where=url, mend=_PACK)


def write_manifest(url: str | Path, manifest: Manifest) -> None:
    """Write the manifest, atomically; call it last, when every shard is in place."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
    storage.write_bytes(storage.join(url, MANIFEST), (text + "\n").encode())


def check_streams(counts: Sequence[int], *, streams: int, packet: int, where: str = "") -> None:
    """Whether shards of these sizes can feed the canonical streams (`order.StreamOrder`) in every epoch.

    Args:
        counts: samples of each shard.
        streams: canonical streams.
        packet: samples that are read together from one stream.
        where: names the shards in errors.

    Raises:
        UserError: fewer shards than streams, or a stream could hold less than one packet.
    """
    filled = [count for count in counts if count]
    if len(filled) < streams:
        raise UserError(
            f"{len(filled)} shards cannot feed {streams} streams",
            where=where,
            mend=f"set data.streams to {len(filled) or 1} or less, or pack into {streams} shards or more",
        )
    # A stream's load when every shard goes to the emptiest stream, whatever the order of the shards, is at
    # least the smallest shard, and at least the even share less the largest shard.
    even = (sum(filled) - (streams - 1) * max(filled)) // streams
    least = max(min(filled), even)
    if least < packet:
        raise UserError(
            f"a stream may hold only {least} samples, less than a packet of {packet}",
            where=where,
            mend=f"set data.packet to {max(1, least)} or less, or fewer data.streams, or pack equal shards",
        )


def deal(order: Sequence[int], counts: Sequence[int], streams: int) -> list[list[int]]:
    """Deal shards, in the given order, each to the stream that holds the fewest samples so far."""
    loads = [(0, stream) for stream in range(streams)]
    dealt: list[list[int]] = [[] for _ in range(streams)]
    for shard in order:
        load, stream = loads[0]
        dealt[stream].append(shard)
        heapq.heapreplace(loads, (load + counts[shard], stream))
    return dealt


def hash_bytes(buffer: storage.Buffer) -> str:
    """SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in storage.chunks(buffer):
        digest.update(chunk)
    return digest.hexdigest()
