"""Small image folders and shards for the tests of the data room."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vqscale import storage
from vqscale.data import images, tar
from vqscale.data.manifest import IMAGES, Manifest, Shard, hash_bytes, write_manifest

SHARED = Path(__file__).parents[2] / "shared" / "data"


def picture(number: int, size: int = 8) -> np.ndarray:
    """A smooth image whose first pixel is its number, uint8 [size, size, 3]."""
    y, x = np.mgrid[:size, :size]
    image = np.stack([x * 20 + number, y * 20, x + y], -1).astype(np.uint8)
    image[0, 0] = (number % 256, number // 256, 0)
    return image


def image_folder(root: Path, classes: int = 3, each: int = 10, size: int = 8) -> Path:
    for number in range(classes * each):
        path = root / f"class{number % classes}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.encode_png(picture(number, size)))
    return root


def image_shards(root: Path, counts: list[int], *, size: int = 8, broken: dict[int, bytes] | None = None) -> Manifest:
    """Shards of numbered pictures; sample i of all has label i % 1000 and, in `broken`, other bytes."""
    shards, number = [], 0
    for place, count in enumerate(counts):
        samples = []
        for _ in range(count):
            content = (broken or {}).get(number, images.encode_png(picture(number, size)))
            samples.append((f"{number:06d}", {"png": content, "cls": str(number).encode()}))
            number += 1
        path = root / f"s{place}.tar"
        root.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            tar.write(file, samples)
        buffer = storage.open_shard(path)
        shards.append(Shard(name=path.name, samples=count, bytes=len(buffer), sha256=hash_bytes(buffer)))
    manifest = Manifest(format=IMAGES, shards=tuple(shards), image_size=size)
    write_manifest(root, manifest)
    return manifest
