"""The manifest of a checkpoint: its files by size and hash, and in which pieces its tensors lie in them.

Whoever reads one trusts nothing in it: names, numbers and their agreement are checked before anything is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FORMAT: Literal["vqscale-checkpoint/1"] = "vqscale-checkpoint/1"
MANIFEST, STATE = "manifest.json", "state.json"

LARGEST = 256 << 20
"""Bytes of the largest manifest that is read; one of 100,000 tensors on 64 ranks has a tenth of it."""

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64"), 8),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
"""Bytes of an element by dtype, as safetensors names them; there are no others."""

_MOST = 1 << 48  # elements of a tensor, and bytes of a file: far above any, far below what overflows

Count = Annotated[int, Field(ge=0, le=_MOST)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
# No separator, no leading dot: a file of the checkpoint's own folder, and nothing else.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.[A-Za-z0-9]{1,15}){0,2}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    """One file of the checkpoint."""

    bytes: Count
    """Its size."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of its content."""


class Part(NamedTuple):
    """A range of a tensor's elements, in row-major order, in one of the files."""

    file: str
    start: int
    length: int

    def key(self, name: str) -> str:
        """Its name inside the file."""
        return f"{name}:{self.start}"


class TensorRecord(_Record):
    """One tensor."""

    shape: Annotated[tuple[Count, ...], Field(max_length=16)]
    """Of the whole tensor."""
    dtype: str
    """As safetensors names it (`ITEM_BYTES`)."""
    parts: Annotated[tuple[tuple[FileName, Count, Count], ...], Field(min_length=1)]
    """[file, start, count] in the order of their starts; together they are the tensor, each element once."""

    @property
    def elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)

    @property
    def places(self) -> list[Part]:
        """The parts, by name."""
        return [Part(*part) for part in self.parts]

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is none that is read")
        if not 0 <= self.elements <= _MOST:
            raise ValueError("has more elements than any tensor")
        ends = [0, *(start + count for _, start, count in self.parts)]
        if [start for _, start, _ in self.parts] != ends[:-1] or ends[-1] != self.elements:
            raise ValueError("its parts overlap or leave gaps")
        return self


CODES_OF = "codes_of"
"""Key in `Manifest.made_by` of a prior: fingerprint of the tokenizer whose codes it was trained on."""
SUBMITTED = "submitted"
"""Key in `Manifest.made_by`: when and where the run was made, which tells it from others of the same id."""


class Manifest(_Record):
    """What a checkpoint holds."""

    sha256: str = ""
    """Hash of all the rest, so that no byte of it can change unseen; `encode` computes it."""
    format: Literal["vqscale-checkpoint/1"] = FORMAT
    """Version of the format."""
    step: Annotated[int, Field(ge=0, lt=10**12)]
    """Finished optimizer steps."""
    world: Annotated[int, Field(ge=1)]
    """Ranks that wrote it; any number can read it."""
    strategy: str
    """How the model was spread over them; any other can read it."""
    made_by: dict[str, str] = {}
    """Recipe, code and versions, for people; which run it is (`SUBMITTED`); of a prior whose codes it knows
    (`CODES_OF`)."""
    files: dict[FileName, FileRecord]
    """All files but this one."""
    tensors: dict[Name, TensorRecord]
    """By canonical name, such as `model/encoders.0.0.weight`."""

    @property
    def size(self) -> int:
        """Bytes of all files but this one."""
        return sum(file.bytes for file in self.files.values())

    def parts_in(self, file: str) -> dict[str, tuple[str, int]]:
        """(dtype, elements) of each part in a file, by its name inside the file."""
        return {
            part.key(name): (tensor.dtype, part.length)
            for name, tensor in self.tensors.items()
            for part in tensor.places
            if part.file == file
        }

    def encode(self) -> bytes:
        """As it stands in `manifest.json`; equal manifests give equal bytes."""
        tree = self.model_dump(mode="json", exclude={"sha256"})
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
        return (json.dumps({"sha256": digest, **tree}, indent=1, sort_keys=True) + "\n").encode()

    @model_validator(mode="after")
    def _fits_its_files(self) -> Self:
        if STATE not in self.files or MANIFEST in self.files:
            raise ValueError(f"files: {STATE} belongs to them, {MANIFEST} does not")
        held: Counter[str] = Counter()
        for tensor in self.tensors.values():
            for file, _, count in tensor.parts:
                held[file] += count * ITEM_BYTES[tensor.dtype]
        for file, size in held.items():
            if file not in self.files or file == STATE or size > self.files[file].bytes:
                raise ValueError(f"tensors: {size} bytes cannot lie in {file}")
        return self


class FaultError(ValueError):
    """A file of a checkpoint is not what it has to be; says so in one line."""


def parse(data: bytes) -> Manifest:
    """The manifest in a file's content.

    Raises:
        FaultError: it is none.
    """
    try:
        found = Manifest.model_validate_json(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise FaultError(_line(f"{MANIFEST} is not valid ({where}{': ' if where else ''}{fault['msg']})")) from None
    if found.encode() != data:
        raise FaultError(f"{MANIFEST} is not as it was written")
    return found


def parse_state(data: bytes) -> dict[str, Any]:
    """The plain values in `state.json`.

    Raises:
        FaultError: it holds something else.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FaultError(f"{STATE} is no JSON object")
    return found


def sorted_parts(parts: list[Part]) -> tuple[Part, ...]:
    """Parts in the order of a manifest; of those that start at one place the empty ones go before.

    Raises:
        FaultError: two parts overlap.
    """
    ordered = sorted(parts, key=lambda part: (part.start, part.length))
    for one, other in pairwise(ordered):
        if one.start + one.length > other.start:
            raise FaultError(f"parts {one} and {other} overlap")
    return tuple(ordered)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:300] + "…"
