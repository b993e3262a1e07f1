"""Seeds made of several numbers, the same on every machine and Python."""

from __future__ import annotations

import hashlib


def mix(*parts: int | str) -> int:
    """A seed in [0, 2^63) from numbers and words, such as (run seed, step, level)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
