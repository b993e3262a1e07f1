"""Files by URL: local paths directly, everything with a scheme through fsspec (`vqscale.storage.remote`).

Light on purpose: the launcher checks manifests with it, so fsspec is imported only for URLs that need it.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqscale import files
from vqscale.errors import UserError
from vqscale.masking import shown as shown
from vqscale.storage import remote

Buffer = mmap.mmap | bytes
"""A whole shard for random access; slices of it are `bytes`."""


def join(url: str | Path, *names: str) -> str:
    """The URL of something below `url`."""
    return "/".join([str(url).rstrip("/") or "/", *names])


def local_path(url: str | Path) -> Path | None:
    """The path behind a local URL (`file://` or no scheme); None for what lies elsewhere."""
    text = str(url)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return None if "://" in text or "::" in text else Path(text)


def size(url: str | Path) -> int | None:
    """Size of a file in bytes; None when there is no such file.

    Raises:
        UserError: the storage cannot be reached, or does not say.
    """
    path = local_path(url)
    if path is not None:
        return path.stat().st_size if path.is_file() else None
    found = remote.find(url)
    if found is None or found.folder:
        return None
    if found.size is None:
        raise remote.no_size(url)
    return found.size


def list_names(url: str | Path) -> list[str] | None:
    """Names in a folder, sorted; None when there is no such folder.

    Raises:
        UserError: the storage cannot be reached.
    """
    path = local_path(url)
    if path is not None:
        return sorted(os.listdir(path)) if path.is_dir() else None
    names = remote.entries(url)
    return None if names is None else sorted(names)


def read_bytes(url: str | Path) -> bytes:
    """A whole file.

    Raises:
        UserError: it is absent or cannot be read.
    """
    path = local_path(url)
    if path is None:
        return remote.read_remote(url)[:]
    with _explained(url):
        return path.read_bytes()


def read_range(url: str | Path, start: int, stop: int) -> Buffer | bytearray:
    """The bytes of a file from `start` up to `stop`.

    Raises:
        UserError: it is absent, cannot be read, or ends before.
    """
    path = local_path(url)
    if path is None:
        return remote.read_range(url, start, stop)
    buffer = bytearray(stop - start)
    with _explained(url), path.open("rb", buffering=0) as file:
        file.seek(start)
        filled = 0
        while filled < len(buffer):  # one call reads 2 GiB at most
            count = file.readinto(memoryview(buffer)[filled:])
            if not count:
                raise OSError(f"it ends at byte {start + filled}, {stop} were expected")
            filled += count
    return buffer


def write_bytes(url: str | Path, data: bytes) -> None:
    """Write a whole file so that no reader sees a part of it; object stores commit when the upload ends."""
    path = local_path(url)
    if path is None:
        remote.write_remote(url, data)
        return
    with _explained(url):
        files.write_bytes(path, data)


def remove(url: str | Path) -> None:
    """Remove a file; nothing happens when there is none."""
    path = local_path(url)
    if path is None:
        remote.remove_remote(url)
        return
    with _explained(url):
        path.unlink(missing_ok=True)


def remove_folder(url: str | Path) -> None:
    """Remove a folder with all that is in it; nothing happens when there is none."""
    path = local_path(url)
    if path is None:
        remote.remove_folder_remote(url)
    elif path.exists():
        with _explained(url):
            shutil.rmtree(path)


def open_shard(url: str | Path) -> Buffer:
    """A shard for random access: mapped into memory where it is local, else read whole.

    The mapping is released with its last reference.

    Raises:
        UserError: the shard is absent or cannot be read.
    """
    path = local_path(url)
    if path is None:
        return remote.read_remote(url)
    with _explained(url), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""  # an empty file cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def chunks(buffer: Buffer, length: int = 1 << 24) -> Iterator[bytes]:
    """A buffer in pieces, for hashing without a second copy of the whole."""
    for start in range(0, len(buffer), length):
        yield buffer[start : start + length]


@contextmanager
def _explained(url: str | Path) -> Iterator[None]:
    """Turns the faults of local storage into one line that names the path."""
    try:
        yield
    except FileNotFoundError:
        raise UserError("no such file", where=str(url), mend="check the path") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be reached ({error or type(error).__name__})", where=str(url)) from error
