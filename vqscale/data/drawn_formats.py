"""The forms that drawn images take on disk: PNG files, WebDataset shards, one `.npz`."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vqscale.data import tar
from vqscale.data.image_source import ImageSource
from vqscale.data.images import decode, encode_png
from vqscale.data.manifest import IMAGES, MANIFEST, Manifest, Shard, hash_bytes, write_manifest
from vqscale.data.npz import Streamed, map_npz, write_npz
from vqscale.data.shards import open_shards
from vqscale.data.source import Fields
from vqscale.files import clear_beside, write_bytes

Pixels = NDArray[np.uint8]
Facts = Mapping[str, Any]
"""Plain values that a part's record keeps for `whole` and `finish`."""


@dataclass(frozen=True)
class Place:
    """Where images lie, and what is known of each before it is drawn."""

    folder: Path
    size: int
    """Side of the images in pixels."""
    classes: tuple[str, ...]
    """Names of all classes; empty when there are none."""
    labels: tuple[int, ...]
    """Class of each image; -1 for none."""
    parts: tuple[range, ...]
    """The images' numbers, in ranges that are written at once."""


class Format(Protocol):
    """One form of output. A part is written whole, or can be written again."""

    def write(self, number: int, images: Pixels) -> Facts:
        """Write a part by its number: images uint8 [n, S, S, 3]; returns what its record has to keep."""
        ...

    def whole(self, number: int, facts: Facts) -> bool:
        """Whether what was recorded of a part is still there."""
        ...

    def finish(self, facts: Sequence[Facts]) -> list[str]:
        """Make the whole of all parts; returns the paths of its files in the folder."""
        ...

    def read(self, numbers: NDArray[np.int64]) -> Pixels:
        """Images uint8 [n, S, S, 3] by number, once all is finished."""
        ...


class PngFiles:
    """A PNG file an image, in a folder of its class where there are classes."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._folders = [_file_name(name) for name in place.classes]

    def write(self, number: int, images: Pixels) -> Facts:
        """A file an image."""
        for image, pixels in zip(self._place.parts[number], images, strict=True):
            write_bytes(self._place.folder / self._path(image), encode_png(pixels))
        return {}

    def whole(self, number: int, facts: Facts) -> bool:
        """Whether every file is there."""
        return all((self._place.folder / self._path(image)).is_file() for image in self._place.parts[number])

    def finish(self, facts: Sequence[Facts]) -> list[str]:
        """Nothing is left to do."""
        return [self._path(image) for image in range(len(self._place.labels))]

    def read(self, numbers: NDArray[np.int64]) -> Pixels:
        """As `Format.read`."""
        files = [self._place.folder / self._path(image) for image in numbers.tolist()]
        return _stacked([decode(file.read_bytes(), self._place.size) for file in files], self._place.size)

    def _path(self, image: int) -> str:
        label = self._place.labels[image]
        folder = f"{self._folders[label]}/" if label >= 0 else ""
        return f"{folder}{image:06d}.png"


class Shards:
    """A WebDataset shard a part, and a manifest: a data set like any other."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._starts = np.array([part.start for part in place.parts])

    def write(self, number: int, images: Pixels) -> Facts:
        """One shard."""
        content, name = io.BytesIO(), f"samples-{number:05d}.tar"
        labels = self._place.labels
        rows = zip(self._place.parts[number], images, strict=True)
        tar.write(content, ((f"{image:08d}", _members(pixels, labels[image])) for image, pixels in rows))
        data = content.getvalue()
        write_bytes(self._place.folder / name, data)
        shard = Shard(name=name, samples=len(images), bytes=len(data), sha256=hash_bytes(data))
        return shard.model_dump(mode="json")

    def whole(self, number: int, facts: Facts) -> bool:
        """Whether the shard is there at its size."""
        path = self._place.folder / facts["name"]
        return path.is_file() and path.stat().st_size == facts["bytes"]

    def finish(self, facts: Sequence[Facts]) -> list[str]:
        """Write the manifest."""
        place = self._place
        shards = tuple(Shard.model_validate(one) for one in facts)
        made = Manifest(
            format=IMAGES, shards=shards, classes=place.classes, image_size=place.size, source={"drawn": "samples.json"}
        )
        write_manifest(place.folder, made)
        return [*(shard.name for shard in shards), MANIFEST]

    def read(self, numbers: NDArray[np.int64]) -> Pixels:
        """As `Format.read`."""
        source = ImageSource(open_shards(str(self._place.folder)), self._place.size)
        out: Fields = {name: spec.empty(len(numbers)) for name, spec in source.spec.items()}
        parts = np.searchsorted(self._starts, numbers, side="right") - 1
        for part in np.unique(parts).tolist():
            rows = np.flatnonzero(parts == part)
            some = {name: spec.empty(len(rows)) for name, spec in source.spec.items()}
            source.open_group([part]).read(numbers[rows] - self._starts[part], some, 0)
            out["image"][rows] = some["image"]
        return out["image"]


class Npz:
    """One `samples.npz` as ADM's evaluation reads it (Dhariwal & Nichol 2021): `arr_0` uint8 [N, S, S, 3] and, where
    there are classes, `arr_1` int64 [N].
    """

    FILE = "samples.npz"

    def __init__(self, place: Place) -> None:
        self._place = place

    def write(self, number: int, images: Pixels) -> Facts:
        """An array of the part's images, until all are there."""
        content = io.BytesIO()
        np.save(content, images)
        write_bytes(self._part(number), content.getvalue())
        return {"bytes": content.tell()}

    def whole(self, number: int, facts: Facts) -> bool:
        """Whether the part's array is there at its size."""
        path = self._part(number)
        return path.is_file() and path.stat().st_size == facts["bytes"]

    def finish(self, facts: Sequence[Facts]) -> list[str]:
        """Join the parts, one in memory at a time."""
        place, count = self._place, len(self._place.labels)
        path = place.folder / self.FILE
        clear_beside(path)
        parts = (np.load(self._part(number)) for number in range(len(place.parts)))
        arrays = {"arr_0": Streamed((count, place.size, place.size, 3), np.dtype(np.uint8), parts)}
        if place.classes:
            labels = np.array(place.labels, np.int64)
            arrays["arr_1"] = Streamed((count,), np.dtype(np.int64), [labels])
        write_npz(path, arrays)
        return [self.FILE]

    def read(self, numbers: NDArray[np.int64]) -> Pixels:
        """As `Format.read`."""
        found: Pixels = np.array(map_npz(self._place.folder / self.FILE, "arr_0")[numbers])
        return found

    def _part(self, number: int) -> Path:
        return parts_folder(self._place.folder) / f"{number:05d}.npy"


FORMATS: dict[str, type[PngFiles] | type[Shards] | type[Npz]] = {"png": PngFiles, "webdataset": Shards, "npz": Npz}
"""`sample.output` → how it is written."""


def parts_folder(folder: Path) -> Path:
    """Records of the finished parts, as long as not all are."""
    return folder / "parts"


def clear_parts(folder: Path) -> None:
    """Remove the records, and what a format keeps beside them."""
    shutil.rmtree(parts_folder(folder), ignore_errors=True)


def _members(pixels: Pixels, label: int) -> dict[str, bytes]:
    return {"png": encode_png(pixels), **({"cls": b"%d" % label} if label >= 0 else {})}


def _file_name(name: str) -> str:
    """A class as a folder: names are the user's, and must neither lead elsewhere nor hide."""
    return name.replace("/", "_").replace("\0", "_").lstrip(".") or "_"


def _stacked(images: Sequence[Pixels], size: int) -> Pixels:
    return np.stack(images) if images else np.empty((0, size, size, 3), np.uint8)
