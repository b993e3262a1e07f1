"""The head of a safetensors file: which flat tensors it holds, and where in it they begin.

Written and read here, not by the library, for two reasons. A rank's file is its staging buffer with such a head before
it, written and hashed in one go, without a copy. And ranges of a file are read by URL too. The tests compare both ways
with the library. Format: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from vqscale.checkpoint.manifest import FORMAT, ITEM_BYTES, FaultError

LARGEST = 100_000_000
"""Bytes of the largest head that is read, as in the library."""
_LENGTH = 8  # bytes of the number before the head


class Place(NamedTuple):
    """Where a flat tensor lies."""

    dtype: str
    length: int
    """Elements."""
    begin: int
    """First byte, counted from the beginning of the file."""

    @property
    def end(self) -> int:
        """Byte behind the last one."""
        return self.begin + self.length * ITEM_BYTES[self.dtype]


def arrange(tensors: Mapping[str, tuple[str, int]]) -> tuple[bytes, dict[str, Place]]:
    """The head of a file for flat tensors, and where each lies.

    The widest dtypes come first, and the head is a multiple of 8 bytes long, so every tensor is aligned.

    Args:
        tensors: (dtype, elements) by name.
    """
    names = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))
    places, end = {}, 0
    for name in names:
        places[name] = Place(*tensors[name], end)
        end = places[name].end
    entries = {
        name: {"dtype": place.dtype, "shape": [place.length], "data_offsets": [place.begin, place.end]}
        for name, place in places.items()
    }
    text = json.dumps({"__metadata__": {"format": FORMAT}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    head = len(text).to_bytes(_LENGTH, "little") + text
    return head, {name: place._replace(begin=place.begin + len(head)) for name, place in places.items()}


def head_length(first: bytes, size: int) -> int:
    """Bytes of the whole head of a file of `size` bytes, from its first 8.

    Raises:
        FaultError: no file has such a head.
    """
    found = int.from_bytes(first[:_LENGTH], "little")
    if len(first) < _LENGTH or found > min(LARGEST, size - _LENGTH):
        raise FaultError(f"its head says that it has {found} bytes, in a file of {size}")
    return _LENGTH + found


def parse(head: bytes, size: int) -> dict[str, Place]:
    """The tensors of a file of `size` bytes by name, from its whole head (`head_length` bytes).

    Raises:
        FaultError: the head is broken, or does not fit the file.
    """
    try:
        tree = json.loads(head[_LENGTH:])
        if not isinstance(tree, dict):
            raise ValueError("is no object")
        tree.pop("__metadata__", None)
        places = {name: _place(entry, len(head)) for name, entry in tree.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FaultError(f"its head is broken ({type(error).__name__})") from None
    end = len(head)
    for place in sorted(places.values(), key=lambda place: (place.begin, place.end)):
        if place.begin != end:
            raise FaultError("its tensors overlap or leave gaps")
        end = place.end
    if end != size:
        raise FaultError(f"its tensors end at byte {end} of {size}")
    return places


def _place(entry: Any, offset: int) -> Place:
    dtype, (count,), (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (count, begin, end)):
        raise ValueError("numbers")
    place = Place(dtype, count, offset + begin)
    if dtype not in ITEM_BYTES or place.end != offset + end:
        raise ValueError("sizes")
    return place
