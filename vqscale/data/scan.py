"""What a folder of class folders, or a tar of one, holds: images, their classes, and what is left out."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vqscale import storage
from vqscale.data import tar
from vqscale.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


class Entry(NamedTuple):
    """One image file."""

    name: str
    """Path inside the folder or the tar."""
    label: int
    """Index of its class; -1 when there are none."""
    offset: int
    """Where it begins in the tar; -1 in a folder."""
    size: int


@dataclass(frozen=True)
class Scan:
    """Images of a folder or a tar."""

    path: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    """Sorted by name."""
    ignored: tuple[tuple[str, str], ...]
    """(name, why) of the files that are left out: `not an image`, `unsafe path`, `no class`."""

    def read(self) -> Reader:
        """Open the files for reading."""
        return Reader(self.path)


class Reader:
    """Reads entries of a folder or a tar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar = storage.open_shard(path) if path.is_file() else None

    def __call__(self, entry: Entry) -> bytes:
        """The entry's bytes; `OSError` when they cannot be read."""
        if self._tar is None:
            return (self._path / entry.name).read_bytes()
        return self._tar[entry.offset : entry.offset + entry.size]


def scan(path: Path, classes: Sequence[str] | None = None) -> Scan:
    """List the images of a folder, or of an uncompressed tar.

    The class is the first folder of the path, after the folders that all images share. Images that all lie in
    one folder have no class.

    Args:
        path: folder or tar.
        classes: names of the labels 0, 1, ...; by default the class folders, sorted. Empty: no image has a class.

    Raises:
        UserError: nothing there, or no image in it.
    """
    files = sorted(_tar_files(path) if path.is_file() else _folder_files(path))
    ignored, images = [], []
    for name, offset, size in files:
        reason = _reason_against(name)
        if reason:
            ignored.append((name, reason))
        else:
            images.append((name, offset, size))
    if not images:
        more = f" among {len(files)} files" if files else ", it is empty"
        raise UserError(f"holds no images{more}", where=str(path), mend=f"it needs {', '.join(IMAGE_SUFFIXES)} files")
    folders = [_class_of(name, depth) for depth in [_shared_depth([i[0] for i in images])] for name, _, _ in images]
    names = tuple(classes) if classes is not None else tuple(sorted({folder for folder in folders if folder}))
    labels = {name: label for label, name in enumerate(names)}
    entries = []
    for (name, offset, size), folder in zip(images, folders, strict=True):
        if names and folder not in labels:
            ignored.append((name, "no class"))
        else:
            entries.append(Entry(name, labels.get(folder, -1), offset, size))
    return Scan(path, names, tuple(entries), tuple(ignored))


def are_parts(classes: Sequence[str]) -> bool:
    """Whether all classes are called as the parts of a data set are, such as train and val: hardly what was meant."""
    return bool(classes) and all(name.lower() in _PARTS for name in classes)


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A folder or tar as it is; a gzip-compressed tar as a temporary uncompressed one.

    Raises:
        UserError: no such path, or neither folder nor tar.
    """
    if not path.exists():
        raise UserError("no such file or folder", where=str(path), mend="check the path")
    if path.is_dir():
        yield path
        return
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    if not compressed:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="vqscale-pack-") as folder:
        plain = Path(folder) / "source.tar"
        try:
            with gzip.open(path) as source, plain.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"is cut off or damaged ({error})", where=str(path), mend="copy it again") from None
        yield plain


def _folder_files(root: Path) -> Iterator[tuple[str, int, int]]:
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            below.clear()
            continue
        seen.add(real)
        for name in names:
            yield Path(folder, name).relative_to(root).as_posix(), -1, -1


def _tar_files(path: Path) -> Iterator[tuple[str, int, int]]:
    for name, offset, size in tar.members(storage.open_shard(path), str(path)):
        yield name.removeprefix("./"), offset, size


def _reason_against(name: str) -> str:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return "unsafe path"
    if parts.name.startswith(".") or parts.suffix.lower() not in IMAGE_SUFFIXES:
        return "not an image"
    return ""


def _shared_depth(names: list[str]) -> int:
    """Number of folders, from the top, that all images share."""
    first, last = PurePosixPath(names[0]).parts[:-1], PurePosixPath(names[-1]).parts[:-1]  # names are sorted
    shared = [a == b for a, b in zip(first, last, strict=False)]
    return len(shared) if all(shared) else shared.index(False)


def _class_of(name: str, depth: int) -> str:
    parts = PurePosixPath(name).parts[:-1]
    return parts[depth] if len(parts) > depth else ""
