"""What is known of each finished code shard, beside it in `NAME.json`, and the manifest that is made of it.

An extraction, or a copy, that was killed goes on with the shards that have no valid record.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from vqscale import storage
from vqscale.data.manifest import CODES, CodeLevel, Manifest, Shard
from vqscale.errors import UserError

FLIPPED = "~flip"
"""End of the key of a mirrored sample."""
CROPPED = "~crop"
"""End of the key of a further square of an image, before its number."""


class Views(NamedTuple):
    """What of each image has codes."""

    flips: bool = False
    """Whether each image is there a second time, mirrored."""
    crops: int = 1
    """Squares that were cut from it."""
    crop_seed: int = 0
    """Which ones."""

    @property
    def endings(self) -> list[str]:
        """End of the key of each of an image's samples, in their order."""
        crops = ["", *(f"{CROPPED}{number}" for number in range(1, self.crops))]
        return [f"{crop}{flip}" for crop in crops for flip in (("", FLIPPED) if self.flips else ("",))]


PLAIN = Views()
"""The centre square alone."""


class CodeRecord(BaseModel):
    """What is known of one finished code shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard
    """Name, samples, bytes and hash."""
    fingerprint: str = ""
    """Identity of the tokenizer."""
    flips: bool = False
    """As in `Views`."""
    crops: int = 1
    crop_seed: int = 0
    skipped: int = 0
    """Bad images that have no codes."""
    bad: tuple[tuple[str, str], ...] = ()
    """Key and kind of each of them."""
    usage: dict[str, list[int]] = {}
    """Level name → how often each code was used."""

    @property
    def views(self) -> Views:
        """What of each image has codes."""
        return Views(self.flips, self.crops, self.crop_seed)


def write_record(folder: str, record: CodeRecord) -> None:
    """Record that a code shard is finished."""
    text = json.dumps(record.model_dump(mode="json")) + "\n"
    storage.write_bytes(_record_url(folder, record.shard.name), text.encode())


def read_record(folder: str, name: str, fingerprint: str = "", views: Views = PLAIN) -> CodeRecord | None:
    """The record of a finished code shard.

    Returns:
        None when the shard has to be written: no record, no such file or one of another size, or written by
        another tokenizer than `fingerprint` names, or of other views.
    """
    record = stored_record(folder, name)
    if record is None or (record.fingerprint, record.views) != (fingerprint, views):
        return None
    return record if storage.size(storage.join(folder, name)) == record.shard.bytes else None


def stored_record(folder: str, name: str) -> CodeRecord | None:
    """The record beside a code shard, whatever it says; None when there is none that can be read."""
    where = _record_url(folder, name)
    if storage.size(where) is None:
        return None
    try:
        return CodeRecord.model_validate_json(storage.read_bytes(where))
    except ValueError:
        return None


def read_records(folder: str, names: Sequence[str], fingerprint: str, views: Views = PLAIN) -> list[CodeRecord]:
    """The records of all shards, in the order of `names`.

    Raises:
        UserError: a shard is not recorded.
    """
    records = []
    for name in names:
        record = read_record(folder, name, fingerprint, views)
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


def _record_url(folder: str, name: str) -> str:
    return storage.join(folder, f"{name}.json")
