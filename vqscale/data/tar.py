"""WebDataset tars: an index of their members over a buffer, and a writer with reproducible bytes.

The index walks headers only (ustar, with GNU long names and pax paths and sizes) and is much faster than
`tarfile`, which builds an object for each member.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from vqscale.errors import UserError
from vqscale.storage import Buffer

BLOCK = 512
RECORD = 10_240
"""`tarfile` and tar pad archives to records of this many bytes."""

_AGAIN = "copy it again, or write it again"
_ZERO = bytes(BLOCK)
_META = re.compile(r"__[^/]*__($|/)")
_PAX = re.compile(rb"(\d+) ([^=]+)=")
_FILE, _LONG_NAME, _PAX_HEADER, _OTHER_HEADERS = b"0\0", ord("L"), ord("x"), b"gK"


class Member(NamedTuple):
    """One regular file of a tar."""

    name: str
    offset: int
    """Where its bytes begin in the buffer."""
    size: int


class Sample(NamedTuple):
    """Members that share a key."""

    key: str
    fields: dict[str, tuple[int, int]]
    """Extension in lower case → offset and size in bytes."""


def members(buffer: Buffer, where: str = "tar") -> Iterator[Member]:
    """Walk a tar's regular files without reading their content.

    Args:
        buffer: the whole archive.
        where: names it in errors.

    Raises:
        UserError: the archive is cut off or damaged.
    """
    for name, offset, size in _walk(buffer, where):
        yield Member(name, offset, size)


def samples(buffer: Buffer, where: str = "tar") -> list[Sample]:
    """A tar's WebDataset samples: consecutive members with the same key, as `webdataset` groups them.

    The key is the path up to the first dot of its last part; files without a key or extension and metadata
    (`__name__`) are left out.

    Raises:
        UserError: the archive is damaged, or a sample has an extension twice.
    """
    found, fault = whole_samples(buffer, where)
    if fault:
        raise fault
    return found


def whole_samples(buffer: Buffer, where: str = "tar") -> tuple[list[Sample], UserError | None]:
    """The samples before the first fault of a tar, and this fault; the last of them may lack members."""
    found: list[Sample] = []
    last: str | None = None
    fields: dict[str, tuple[int, int]] = {}
    try:
        for name, offset, size in _walk(buffer, where):
            slash = name.rfind("/") + 1
            dot = name.find(".", slash)
            if dot <= slash or (name.startswith("__") and _META.match(name)):
                continue
            key, extension = name[:dot], name[dot + 1 :].lower()
            if key != last:
                last, fields = key, {}
                found.append(Sample(key, fields))
            elif extension in fields:
                raise UserError(f"sample {key!r} has .{extension} twice", where=where, mend=_AGAIN)
            fields[extension] = (offset, size)
    except UserError as fault:
        return found, fault
    return found, None


def _walk(buffer: Buffer, where: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file. Written for speed: it runs over every header of a shard."""
    position, end = 0, len(buffer)
    long_name, long_size = "", -1  # from an extension header, for the member that follows it
    sums: dict[bytes, int] = {}
    while True:
        start = position + BLOCK
        header = buffer[position:start]
        if len(header) < BLOCK:
            raise _cut(where, f"no end mark after {end} bytes")
        field = header[148:156]
        # Adler-32's lower half is the sum of the header's bytes (plus one, modulo 65,521), at the speed of C.
        if (zlib.adler32(header) & 0xFFFF) != sums.get(field):
            if header == _ZERO:
                return
            sums[field] = _checked_sum(header, where, position)
        try:
            length = int(header[124:135], 8)  # as most writers have it: eleven digits, then a zero or a blank
        except ValueError:
            length = _number(header[124:136], where, position)
        kind = header[156]
        if kind in _FILE and long_size >= 0:
            length = long_size
        if length < 0:
            raise _damaged(where, position)
        position = start + -(-length // BLOCK) * BLOCK
        if start + length > end:
            raise _cut(where, f"a member needs {start + length} bytes, there are {end}")
        if kind in _FILE:
            if long_name or (header[345] and header[257:263] == b"ustar\0"):
                yield long_name or f"{_text(header[345:500])}/{_text(header[:100])}", start, length
            else:
                yield header[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape"), start, length
        elif kind == _LONG_NAME:
            long_name = _text(buffer[start : start + length])
            continue
        elif kind == _PAX_HEADER:
            long_name, long_size = _pax(buffer[start : start + length], long_name, long_size)
            continue
        elif kind in _OTHER_HEADERS:
            continue
        long_name, long_size = "", -1


def write(file: BinaryIO, items: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write samples byte for byte as `webdataset.TarWriter(mtime=0)` does, without its import of torch.

    Args:
        file: open for writing.
        items: key and, by extension, content of each sample; members stand in the extensions' order.

    Returns:
        Bytes written.
    """
    total = 0
    for key, fields in items:
        for extension in sorted(fields):
            content = fields[extension]
            total += file.write(header(f"{key}.{extension}", len(content)))
            total += file.write(content)
            total += file.write(bytes(-len(content) % BLOCK))
    return total + file.write(end_mark(total))


def header(name: str, size: int) -> bytes:
    """What stands before a member's bytes, which are followed by zeros up to a multiple of `BLOCK`."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "vqscale", "vqscale"
    return info.tobuf(tarfile.PAX_FORMAT)


def end_mark(total: int) -> bytes:
    """The end of an archive whose members take `total` bytes."""
    return bytes(2 * BLOCK + -(total + 2 * BLOCK) % RECORD)


def _cut(where: str, why: str) -> UserError:
    return UserError(f"is cut off ({why})", where=where, mend=_AGAIN)


def _damaged(where: str, position: int) -> UserError:
    return UserError(f"is no tar, or damaged at byte {position}", where=where, mend=_AGAIN)


def _checked_sum(header: bytes, where: str, position: int) -> int:
    """Compare the header's checksum, the sum of its bytes with its own field read as blanks.

    Returns:
        Lower half of the Adler-32 that any header with this checksum field has.
    """
    field = header[148:156]
    try:
        stored = int(field.strip(b" \0") or b"x", 8)
    except ValueError:
        raise _damaged(where, position) from None
    expected = (stored + 1 + sum(field) - 8 * 32) % 65_521
    if expected != zlib.adler32(header) & 0xFFFF:
        raise _damaged(where, position)
    return expected


def _number(field: bytes, where: str, position: int) -> int:
    """A size: octal digits, or base 256 when its first bit is set (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _damaged(where, position) from None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(content: bytes, name: str, size: int) -> tuple[str, int]:
    """Path and size of a pax header (records `LENGTH KEY=VALUE`, each with a newline); what it does not say stays."""
    position = 0
    while match := _PAX.match(content, position):
        end = position + int(match[1])
        value = content[match.end() : end - 1]
        if match[2] == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif match[2] == b"size":
            size = int(value)
        position = end
        if end <= match.start():
            break
    return name, size
