"""A folder that keeps remote shards by content, shared by all processes of a machine, or of several.

A shard is written under a name of its own, synced, and renamed to its key, so that nobody sees a part of one. All
exclusion is by locks that the kernel frees when their holder dies (`flock`): one for each key, so that one process
downloads and the others wait; one for the folder, under which room is made; and one on each unfinished file, by which
those of dead processes are known, on whatever machine they ran. A file that leaves the cache stays valid, and on the
disk, for those who have it mapped; not so on NFS before version 4, where another machine's mapping may break.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqscale.errors import UserError
from vqscale.storage import Buffer, local_path, shown

_ENTRY, _PART, _LOCK = ".shard", ".part", ".lock"


def url_key(url: str, size: int, identity: str) -> str:
    """The key of content whose hash is not known: where it lies, and what the storage says of it."""
    return hashlib.sha256("\n".join([url, str(size), identity]).encode()).hexdigest()


class ShardCache:
    """Keeps files by key, and removes those that were used least recently where room is needed.

    Args:
        folder: made where it is missing.
        limit_bytes: all files together, those that are being written included, are never larger.

    Raises:
        UserError: the folder cannot be written or locked.
    """

    def __init__(self, folder: str | Path, limit_bytes: int) -> None:
        path = local_path(folder)
        if path is None:
            raise UserError("is no local path", where=shown(folder), mend="name a folder on a disk of this machine")
        self.folder, self.limit_bytes = path.expanduser(), limit_bytes
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked("folder"):
            self._used()

    def get(self, key: str) -> Buffer | None:
        """A kept file, mapped into memory, and marked as used now; None when it is not kept.

        Raises:
            UserError: the folder cannot be read.
        """
        with self._explained(), suppress(FileNotFoundError), self._entry(key).open("rb") as file:
            now = time.time_ns()
            os.utime(file.fileno(), ns=(now, now))  # no access times: they are off on most machines
            return _mapped(file.fileno())
        return None

    def open(self, key: str, size: int, fill: Callable[[Draft], bool]) -> Buffer | None:
        """A kept file, or one that is written now; others who ask for it meanwhile wait.

        Args:
            key: of the content, in hexadecimal digits.
            size: its bytes.
            fill: writes the content; says whether it may be kept.

        Returns:
            The content, also where it was not kept. None when all room is taken by what others are writing.

        Raises:
            UserError: the file is larger than the whole cache, or the folder cannot be written.
        """
        with self._locked(key):
            kept = self.get(key)
            if kept is not None:
                return kept
            draft = self._reserve(size)
            if draft is None:
                return None
            try:
                good = fill(draft)
                with self._explained():
                    if good:
                        draft.keep(self._entry(key))
                    return _mapped(draft.descriptor)
            finally:
                draft.close()

    def _entry(self, key: str) -> Path:
        return self.folder / f"{key}{_ENTRY}"

    def _reserve(self, size: int) -> Draft | None:
        """Make room for a file and begin it; None where there is no room."""
        if size > self.limit_bytes:
            raise UserError(
                f"{self.limit_bytes} bytes are less than one shard of {size} bytes",
                where=str(self.folder),
                mend=f"give the cache {size} bytes or more, better many times that, or use none",
            )
        with self._locked("folder"), self._explained():
            used = self._used()
            for _, bytes_, path in self._entries():
                if used + size <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= bytes_
            return Draft(self.folder, size) if used + size <= self.limit_bytes else None

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of the kept files, the least recently used first."""
        return sorted((stat.st_mtime_ns, stat.st_size, path) for path, stat in self._files(_ENTRY))

    def _used(self) -> int:
        """Bytes of all files; what dead processes left unfinished is removed."""
        for path, _ in self._files(_PART):
            _remove_if_abandoned(path)
        return sum(stat.st_size for suffix in (_ENTRY, _PART) for _, stat in self._files(suffix))

    def _files(self, suffix: str) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.glob(f"*{suffix}"):
            with suppress(FileNotFoundError):  # renamed just now
                found.append((path, path.stat()))
        return found

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock that all processes share; its file goes when it is free."""
        path = self.folder / f"{name}{_LOCK}"
        with self._explained():
            descriptor = _lock(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before it is released: who waits for it sees that it is gone
            os.close(descriptor)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the faults of the cache's own folder into one line."""
        try:
            yield
        except OSError as error:
            raise _unusable(self.folder, error) from error


class Draft:
    """A file of the cache that is being written; its room is taken from the beginning.

    Args:
        folder: of the cache.
        size: bytes that it will have.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._path = folder / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}{_PART}"
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        os.ftruncate(self.descriptor, size)

    def write(self, offset: int, data: bytes) -> None:
        """Write some of it; may be called from several threads.

        Raises:
            UserError: the disk is full, or fails.
        """
        try:
            rest = memoryview(data)
            while rest:
                written = os.pwrite(self.descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            raise _unusable(self._folder, error) from error

    def sha256(self) -> str:
        """Hash of what it holds, in hexadecimal digits."""
        return hashlib.sha256(_mapped(self.descriptor)).hexdigest()

    def keep(self, path: Path) -> None:
        """Finish it under its name."""
        os.fsync(self.descriptor)
        self._path.replace(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Remove what was not kept."""
        self._path.unlink(missing_ok=True)
        os.close(self.descriptor)


def _mapped(descriptor: int) -> Buffer:
    empty = os.fstat(descriptor).st_size == 0
    return b"" if empty else mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def _lock(path: Path) -> int:
    """Open and lock a file that its holders remove; returns its descriptor."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has removed it meanwhile


def _remove_if_abandoned(path: Path) -> None:
    """Remove an unfinished file whose writer holds no lock on it any more; call it under the folder's lock."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _unusable(folder: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    mend = "free some space, or give the cache less" if full else "name a folder that can be written and locked"
    return UserError(f"cannot be used as a cache ({error.strerror or error})", where=str(folder), mend=mend)
