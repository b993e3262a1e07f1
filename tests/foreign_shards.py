"""Shards as other tools write them."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data_helpers import picture
from vqscale import storage
from vqscale.data import tar

Samples = Iterable[tuple[str, dict[str, bytes]]]


def image(extension: str, number: int = 0, size: int = 8, height: int = 0) -> bytes:
    """A small image in the format of an extension (`jpg`, `JPEG`, `png`, `webp`)."""
    form = {"jpg": "jpeg"}.get(extension.lower(), extension.lower())
    file = io.BytesIO()
    Image.fromarray(picture(number, max(size, height))[: height or size, :size]).save(file, form)
    return file.getvalue()


def tar_bytes(samples: Samples) -> bytes:
    """A tar of samples."""
    file = io.BytesIO()
    tar.write(file, samples)
    return file.getvalue()


def write_tar(url: str | Path, samples: Samples) -> None:
    """A shard of samples, anywhere."""
    storage.write_bytes(url, tar_bytes(samples))


def numbered(first: int, count: int, **fields: Any) -> Samples:
    """Samples `00000007` of a PNG and what the functions of the number in `fields` give."""
    for number in range(first, first + count):
        more = {name.replace("_", "."): value(number) for name, value in fields.items()}
        yield f"{number:08d}", {"png": image("png", number), **more}


def shards(root: str | Path, counts: Mapping[str, int], **fields: Any) -> None:
    """Shards by name with so many samples each, numbered through."""
    first = 0
    for name, count in counts.items():
        write_tar(storage.join(root, name), numbered(first, count, **fields))
        first += count


def img2dataset(root: Path, counts: list[int], *, captions: bool = True) -> None:
    """A folder as img2dataset 1.4 leaves it: tars by webdataset's writer, statistics and a parquet file beside each."""
    from webdataset.writer import TarWriter

    root.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        with TarWriter(str(root / f"{shard:05d}.tar")) as writer:
            for number in range(count):
                key, caption = f"{shard:05d}{number:04d}", f"A photograph, number {number} of {shard}"
                meta = {
                    "caption": caption if captions else None,
                    "url": f"https://images.example/{key}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": 8,
                    "height": 8,
                    "original_width": 640,
                    "original_height": 480,
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
                text = {"txt": caption} if captions else {}
                writer.write({"__key__": key, "jpg": image("jpg", number), **text, "json": json.dumps(meta, indent=4)})
        (root / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (root / f"{shard:05d}_stats.json").write_text(json.dumps({"count": count + 3, "successes": count}))


def class_folders(path: Path, form: int, names: Iterable[str], *, prefix: str = "") -> None:
    """A tar of class folders by Python's `tarfile` in one of its formats, with a member for each folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = set()
    with tarfile.open(path, "w", format=form) as archive:
        for number, name in enumerate(names):
            folder = f"{prefix}{name}".rpartition("/")[0]
            if folder not in seen:
                seen.add(folder)
                member = tarfile.TarInfo(folder)
                member.type, member.mtime = tarfile.DIRTYPE, 1.5
                archive.addfile(member)
            content = image(name.rpartition(".")[2], number)
            member = tarfile.TarInfo(f"{prefix}{name}")
            member.size, member.mtime = len(content), 1.5
            archive.addfile(member, io.BytesIO(content))


def gnu_tar(path: Path, names: Iterable[str], folder: Path, *what: str) -> None:
    """A tar of class folders by the tar of this system."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image(name.rpartition(".")[2], number))
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "--sort=name", "-cf", path, "-C", folder, *what], check=True)


def read_with_webdataset(path: Path) -> list[dict[str, Any]]:
    """The samples of a shard as webdataset groups them: `__key__`, and bytes by extension."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    with path.open("rb") as file:
        members = [{**member, "__url__": str(path)} for member in tar_file_iterator(file)]
    return [
        {name: value for name, value in sample.items() if name == "__key__" or not name.startswith("__")}
        for sample in group_by_keys(members)
    ]
