"""Codes as planes of bytes and bits: how they lie in code shards before compression."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP = 2**18  # codes that are unpacked at once, so that they stay in the processor's cache from step to step
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.uint16)  # byte → its bits [8]


def pack_codes(codes: NDArray[Any], size: int) -> bytes:
    """Codes of a codebook of `size` as planes: of all codes the lower eight bits, then each higher bit by itself.

    Codes of up to 256 take a byte, of 512 nine bits. Planes of bits are filled up with zeros to whole bytes, from the
    highest bit of a byte down (`numpy.packbits`). zstd makes less of these planes than of 16-bit integers, and unpacks
    them faster; codes that cannot be compressed stay at this size.

    Args:
        codes: integers from 0 to size - 1, of any shape.
        size: of the codebook, up to 65,536.
    """
    flat = np.ascontiguousarray(codes, np.uint16).ravel()
    planes = [np.packbits((flat >> bit) & 1).tobytes() for bit in range(8, (size - 1).bit_length())]
    return b"".join([flat.astype(np.uint8).tobytes(), *planes])


def unpack_codes(planes: bytes, size: int, out: NDArray[np.uint16]) -> None:
    """The inverse of `pack_codes`, into contiguous memory.

    Raises:
        ValueError: there are more or fewer bytes than `out` has codes.
    """
    flat, bits = out.reshape(-1), range(8, (size - 1).bit_length())
    count, width = len(flat), -(-len(flat) // 8)
    stored = np.frombuffer(planes, np.uint8)
    if len(stored) != count + len(bits) * width:
        raise ValueError(f"{len(stored)} bytes do not hold {count} codes")
    low, high = stored[:count], stored[count:].reshape(len(bits), width)
    for start in range(0, count, _STEP):
        part, codes = flat[start : start + _STEP], low[start : start + _STEP]
        eights = high[:, start // 8 : (start + _STEP) // 8]
        if not bits:
            part[:] = codes
            continue
        _unpack(eights[0], bits[0], part)
        for bit, plane in zip(bits[1:], eights[1:], strict=True):
            ones = np.empty_like(part)
            _unpack(plane, bit, ones)
            np.bitwise_or(part, ones, out=part)
        np.bitwise_or(part, codes, out=part)


def _unpack(plane: NDArray[np.uint8], bit: int, out: NDArray[np.uint16]) -> None:
    """One plane: 2^bit in `out` where it has a one, else 0.

    Eight codes a look-up, straight to their place: twice as fast as to unpack single bits and to widen and shift them.
    """
    table, whole = _BITS << bit, len(out) // 8
    table.take(plane[:whole], axis=0, out=out[: 8 * whole].reshape(-1, 8), mode="clip")
    out[8 * whole :] = table[plane[whole:]].reshape(-1)[: len(out) - 8 * whole]
