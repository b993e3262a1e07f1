"""Remote files through fsspec, read so that faults of the network lose nothing.

A file is read in ranges, several at once. A range that fails is asked for again, and only what is missing of it. fsspec
hands out no part of a body that was cut, so the next range is smaller, and grows again once ranges arrive. Size and
identity of the file are compared before and after.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from vqscale.errors import UserError
from vqscale.storage.access import (
    DEFAULT,
    UPLOAD_TRIES,
    Access,
    OnRetry,
    ask,
    asynchronous,
    filesystem,
    request,
    retried,
)
from vqscale.storage.faults import WrongLengthError, absent, kind, shown

Write = Callable[[int, bytes], None]
"""Takes an offset in bytes and what stands there; called from several threads."""

LEAST = 64 << 10
"""Bytes of the smallest range that is asked for."""

_IDENTITY = (
    *("ETag", "etag", "VersionId", "version_id", "generation", "md5Hash", "content_md5", "Content-MD5", "Digest"),
    *("LastModified", "last_modified", "Last-Modified", "mtime", "modified", "updated", "created", "blob_id"),
)
_AGAIN = "copy it again, or write the shards again"


class Found(NamedTuple):
    """What the storage says of a file before it is read."""

    size: int | None
    """Bytes; None where it does not say."""
    identity: str
    """Changes with the content: ETag, generation, time of change, whatever there is; may be empty."""
    folder: bool = False


def identity(info: dict[str, Any]) -> str:
    """What changes with a file's content in fsspec's record of it, on one line; empty where there is no such thing."""
    return " ".join(f"{name}={info[name]}" for name in _IDENTITY if info.get(name))


def find(url: str | Path, access: Access = DEFAULT, on_retry: OnRetry | None = None) -> Found | None:
    """Ask for a file's size and identity; None when there is no such file.

    Raises:
        UserError: the storage cannot be reached.
    """
    info = ask(url, "info", access, on_retry)
    return info and Found(info.get("size"), identity(info), info.get("type") == "directory")


def look(
    url: str | Path, access: Access = DEFAULT, *, size: int | None = None, on_retry: OnRetry | None = None
) -> Found:
    """`find` for a file that has to be there, with a size.

    Args:
        url: the file.
        access: how patiently.
        size: bytes that it should have, or None where nobody knows.
        on_retry: called before another try.

    Raises:
        UserError: there is no such file, it is a folder, or has another size. Also where no size is known at all, since
            nobody could tell then whether all of it has arrived.
    """
    found, where = find(url, access, on_retry), shown(url)
    if found is None:
        raise UserError("no such file", where=where, mend="check the path")
    if found.folder:
        raise UserError("is a folder", where=where, mend="name a file")
    if found.size is None and size is None:
        raise no_size(url)
    if size is not None and found.size not in (None, size):
        raise UserError(f"has {found.size} bytes, its manifest says {size}", where=where, mend=_AGAIN)
    return found._replace(size=size if found.size is None else found.size)


def no_size(url: str | Path) -> UserError:
    """The error about storage that does not say how long a file is."""
    return UserError("the server does not say how long it is", where=shown(url), mend="serve it with Content-Length")


def read_remote(
    url: str | Path, access: Access = DEFAULT, *, size: int | None = None, on_retry: OnRetry | None = None
) -> mmap.mmap | bytes:
    """A whole remote file in memory; slices of it are `bytes`.

    Args:
        url: the file.
        access: how patiently.
        size: bytes that it should have, or None where nobody knows.
        on_retry: called before another try.

    Raises:
        UserError: as `look` and `copy_remote`.
    """
    found = look(url, access, size=size, on_retry=on_retry)
    if not found.size:
        return b""
    # Anonymous memory, not a bytearray: it is filled in place, its slices are bytes, and it is given back at once.
    buffer = mmap.mmap(-1, found.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def write(offset: int, data: bytes) -> None:
        buffer[offset : offset + len(data)] = data

    copy_remote(url, found, write, access, on_retry)
    return buffer


def read_range(url: str | Path, start: int, stop: int, access: Access = DEFAULT) -> mmap.mmap | bytes:
    """The bytes of a remote file from `start` up to `stop`, in memory.

    Raises:
        UserError: as `look` and `copy_remote`; also where the file ends before `stop`.
    """
    found = look(url, access)
    if stop > (found.size or 0):
        raise UserError(f"has {found.size} bytes, {stop} were expected", where=shown(url), mend="copy it again")
    if start >= stop:
        return b""
    buffer = mmap.mmap(-1, stop - start, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def write(offset: int, data: bytes) -> None:
        if offset < start:  # a server without ranges has sent the whole file
            offset, data = start, data[start - offset :]
        data = data[: stop - offset]
        buffer[offset - start : offset - start + len(data)] = data

    copy_remote(url, found, write, access, span=(start, stop))
    return buffer


def copy_remote(
    url: str | Path,
    found: Found,
    write: Write,
    access: Access = DEFAULT,
    on_retry: OnRetry | None = None,
    span: tuple[int, int] | None = None,
) -> None:
    """Read a remote file and hand it on in pieces, in any order, each byte once or more.

    Args:
        url: the file.
        found: what `look` said of it.
        write: takes the pieces.
        access: how patiently.
        on_retry: called before another try.
        span: first byte, and the one behind the last, that are needed; all by default.

    Raises:
        UserError: it cannot be read, or was changed meanwhile.
    """
    try:
        _Copy(url, found.size or 0, write, access, on_retry).run(*(span or (0, found.size or 0)))
    except UserError as fault:
        raise _better(fault, url, found, access) from None
    if _changed(url, found, access, on_retry):
        raise _change(url)


def entries(url: str | Path, access: Access = DEFAULT) -> list[str] | None:
    """Names in a folder; None when there is no such folder.

    Raises:
        UserError: the storage cannot be reached.
    """
    paths = ask(url, "ls", access)
    if paths is None:
        return None
    paths = [str(path if isinstance(path, str) else path["name"]) for path in paths]
    _, folder = filesystem(url, access)
    inside = [path.rstrip("/") for path in paths if path.strip("/") != folder.strip("/")]
    if paths == [folder.rstrip("/")]:  # a file is listed as itself
        return None
    return [path.rpartition("/")[2] for path in inside]


def write_remote(url: str | Path, data: bytes, access: Access = DEFAULT) -> None:
    """Write a whole file; object stores show it when the upload has ended.

    Raises:
        UserError: it cannot be written.
    """

    def put() -> None:
        system, name = filesystem(url, access, tries=UPLOAD_TRIES)
        if not asynchronous(system):  # object stores have no folders, and s3fs would make a bucket that is missing
            system.makedirs(name.rpartition("/")[0], exist_ok=True)
        request(system, "pipe_file", name, data, limit_s=access.limit_s(len(data)))

    retried(put, url, access)


def remove_remote(url: str | Path, access: Access = DEFAULT) -> None:
    """Remove a file; nothing happens when there is none.

    Raises:
        UserError: it cannot be removed.
    """
    if find(url, access) is not None:
        ask(url, "rm_file", access)


def remove_folder_remote(url: str | Path, access: Access = DEFAULT) -> None:
    """Remove a folder with all that is in it; nothing happens when there is none.

    Raises:
        UserError: it cannot be removed.
    """

    def call() -> None:
        system, name = filesystem(url, access)
        system.invalidate_cache()
        try:
            request(system, "rm", name, recursive=True, limit_s=access.timeout_s)
        except FileNotFoundError as error:
            if not absent(error):
                raise

    retried(call, url, access)


class _Copy:
    """One file on its way, in ranges that shrink when they fail."""

    def __init__(self, url: str | Path, size: int, write: Write, access: Access, on_retry: OnRetry | None) -> None:
        self._url, self._size, self._write, self._access, self._on_retry = url, size, write, access, on_retry
        self._system, self._name = retried(partial(filesystem, url, access), url, access)
        self._ranges_known = "http" not in self._system.protocol
        self._length = access.block
        self._patience = 1
        self._whole = False  # a server without ranges has sent all of it
        self._halted = threading.Event()

    def run(self, first: int, stop: int) -> None:
        """Read all from the byte `first` up to `stop`."""
        edges = [*range(first, stop, self._access.block), stop]
        if not self._ranges_known and stop - first > LEAST:
            # Only an answer tells whether an HTTP server knows ranges: the first one comes alone.
            self._span(first, first + LEAST)
            edges[0] += LEAST
        spans = [] if self._whole else list(pairwise(edges))
        if len(spans) > 1 and asynchronous(self._system):
            self._side_by_side(spans)
        else:
            for span in spans:
                self._span(*span)

    def _side_by_side(self, spans: list[tuple[int, int]]) -> None:
        pool = ThreadPoolExecutor(min(self._access.connections, len(spans)), thread_name_prefix="vqscale-remote")
        try:
            tasks = [pool.submit(self._span, *span) for span in spans]
            for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                task.result()
        finally:
            self._halted.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _span(self, start: int, stop: int) -> None:
        while start < stop and not self._whole:
            data = retried(partial(self._ask, start, stop), self._url, self._access, self._on_retry, self._rest)
            if not self._whole:
                self._write(start, data)
            start += len(data)

    def _ask(self, start: int, stop: int) -> bytes:
        """What stands from `start` on, as much of it as is asked for at the moment; less where less comes."""
        length = min(stop - start, self._length)
        limit_s = self._access.limit_s(length) * self._patience
        try:
            span = {"start": start, "end": start + length}  # by name: in s3fs another argument comes before them
            data: bytes = request(self._system, "cat_file", self._name, limit_s=limit_s, **span)
            self._check(data, length)
        except Exception as error:
            fault = kind(error)
            if fault != "status":  # a server that is overloaded is not helped by more requests
                self._length = max(LEAST, length // 2)
            if fault == "timeout" and not self._ranges_known:
                self._patience *= 2  # it may be sending the whole file
            raise
        self._ranges_known, self._patience = True, 1
        if length == self._length:
            self._length = min(self._access.block, 2 * length)
        return data

    def _check(self, data: bytes, length: int) -> None:
        if length < len(data) == self._size:
            self._whole = True
            self._write(0, data)
        elif len(data) > length or not data:
            raise WrongLengthError(f"{length} bytes were asked for, {len(data)} came")
        elif len(data) < length and self._on_retry:
            self._on_retry("length")

    def _rest(self, seconds: float) -> None:
        if self._halted.wait(seconds):
            raise CancelledError


def _better(fault: UserError, url: str | Path, found: Found, access: Access) -> UserError:
    """What is behind a fault: a file that was cut short or replaced fails in odd ways."""
    with suppress(UserError):
        if _changed(url, found, replace(access, retries=0)):
            return _change(url)
    return fault


def _changed(url: str | Path, found: Found, access: Access, on_retry: OnRetry | None = None) -> bool:
    now = find(url, access, on_retry)
    return now is None or now.identity != found.identity or now.size not in (None, found.size)


def _change(url: str | Path) -> UserError:
    return UserError("was changed while it was read", where=shown(url), mend="start again when nobody writes it")
