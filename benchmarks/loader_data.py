"""What the benchmark `loader` reads: photographs, as tars at their own sizes, as pre-sized tars, and as files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from vqscale import storage
from vqscale.data import tar
from vqscale.data.manifest import IMAGES, Manifest, Shard, hash_bytes, write_manifest
from vqscale.data.pack import pack_images
from vqscale.data.scan import scan
from vqscale.errors import UserError

VARIABLE = "VQSCALE_BENCH_IMAGES"
"""Names a tar of photographs where `--data` names none."""

_JPEG = b"\xff\xd8\xff"
_SIDES = ((375, 500), (333, 500), (500, 375), (500, 333), (400, 500), (300, 400), (480, 640), (600, 800))
_SIDE_WEIGHTS = (0.42, 0.20, 0.14, 0.06, 0.06, 0.06, 0.04, 0.02)
_FULL_COLOUR = 0.77  # of the files have unsubsampled colour


@dataclass(frozen=True)
class Photographs:
    """JPEG files."""

    origin: str
    """`given` or `generated`."""
    files: tuple[bytes, ...]

    def facts(self) -> dict[str, Any]:
        """What decides how fast they can be read."""
        return {"origin": self.origin, **facts(self.files)}


def facts(files: Sequence[bytes]) -> dict[str, Any]:
    """Number, mean size, median height and width, and share of each colour subsampling of JPEG files."""
    headers = [simplejpeg.decode_jpeg_header(file) for file in files]
    kinds = [header[3] for header in headers]
    return {
        "files": len(files),
        "mean_kb": round(float(np.mean([len(file) for file in files])) / 1000, 1),
        "median_height": int(np.median([header[0] for header in headers])),
        "median_width": int(np.median([header[1] for header in headers])),
        "subsampling": {kind: round(kinds.count(kind) / len(kinds), 3) for kind in sorted(set(kinds))},
    }


def photographs(path: Path | None, generated: int) -> Photographs:
    """The JPEGs of a tar or folder; where none is named, generated ones.

    Args:
        path: tar or folder; by default what the variable `VQSCALE_BENCH_IMAGES` names.
        generated: number of images to generate.

    Raises:
        UserError: nothing there, or no JPEG in it.
    """
    named = path or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is None:
        return Photographs("generated", tuple(generate(generated)))
    found = scan(named)
    read = found.read()
    files = tuple(file for file in map(read, found.entries) if file.startswith(_JPEG))
    if not files:
        raise UserError("holds no JPEG", where=str(named), mend="name a tar or folder of photographs")
    return Photographs("given", files)


def generate(count: int, seed: int = 0) -> Iterator[bytes]:
    """JPEGs that cost as much to decode as ImageNet's: about 110 KB, median 375×500, 4:4:4 and 4:2:0 mixed.

    Their amplitude spectrum falls as 1/f^1.2, as that of photographs about does (Field, Relations between the
    statistics of natural images and the response properties of cortical cells, 1987), so that a pixel costs as many
    bits.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = _SIDES[rng.choice(len(_SIDES), p=_SIDE_WEIGHTS)]
        full = rng.random() < _FULL_COLOUR
        pixels = _photograph(rng, height, width)
        yield bytes(
            simplejpeg.encode_jpeg(pixels, 93 if full else 72, colorsubsampling="444" if full else "420", fastdct=False)
        )


def _photograph(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Coloured noise with a photograph's spectrum, uint8 [height, width, 3] RGB."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = 1 / max(height, width)

    def plane(slope: float) -> NDArray[np.float64]:
        noise = rng.standard_normal((2, *frequency.shape))
        field = np.fft.irfft2((noise[0] + 1j * noise[1]) * frequency**-slope, (height, width))
        return (field - field.mean()) / field.std()

    luma, blue, red = 115 + 52 * plane(1.2), 14 * plane(1.5), 14 * plane(1.5)
    rgb = np.stack([luma + 1.402 * red, luma - 0.344 * blue - 0.714 * red, luma + 1.772 * blue], axis=-1)
    return rgb.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Shards:
    """Tars with a manifest; sample i has the label i and holds file i % len(files)."""

    url: str
    paths: tuple[Path, ...]
    files: tuple[bytes, ...]
    per_shard: int

    @property
    def samples(self) -> int:
        """Samples of all shards."""
        return len(self.paths) * self.per_shard

    def contents(self) -> list[bytes]:
        """The images of all samples, each in memory of its own, as a reader of the shards meets them."""
        found = []
        for path in self.paths:
            buffer = storage.open_shard(path)
            spans = [sample.fields["jpg"] for sample in tar.samples(buffer, str(path))]
            found += [bytes(buffer[offset : offset + size]) for offset, size in spans]
        return found


def write_shards(files: Sequence[bytes], folder: Path, shards: int, per_shard: int) -> Shards:
    """Write files, as often as needed, into tars of equal numbers of samples, and their manifest."""
    paths, records = [], []
    for number in range(shards):
        path = folder / f"shard-{number:03d}.tar"
        first = number * per_shard
        _write_tar(path, files, range(first, first + per_shard))
        buffer = storage.open_shard(path)
        records.append(Shard(name=path.name, samples=per_shard, bytes=len(buffer), sha256=hash_bytes(buffer)))
        paths.append(path)
    write_manifest(folder, Manifest(format=IMAGES, shards=tuple(records)))
    return Shards(str(folder), tuple(paths), tuple(files), per_shard)


def _write_tar(path: Path, files: Sequence[bytes], labels: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        tar.write(file, ((f"{n:08d}", {"jpg": files[n % len(files)], "cls": b"%d" % n}) for n in labels))
        file.flush()
        os.fsync(file.fileno())  # pages that are not written yet cannot be dropped


def presized(files: Sequence[bytes], folder: Path, size: int, quality: int) -> list[bytes]:
    """The files as `vqscale data pack` stores them at a size, in the same order."""
    for number, file in enumerate(files):
        path = folder / "photographs" / f"{number:06d}" / "image.jpg"  # a class each, so that labels tell them apart
        path.parent.mkdir(parents=True)
        path.write_bytes(file)
    packed = folder / "packed"
    (manifest,) = pack_images(folder / "photographs", str(packed), size=size, quality=quality).values()
    found: dict[int, bytes] = {}
    for shard in manifest.shards:
        buffer = storage.open_shard(packed / shard.name)
        for sample in tar.samples(buffer):
            label, image = (bytes(buffer[offset : offset + length]) for offset, length in _spans(sample))
            found[int(label)] = image
    return [found[number] for number in range(len(files))]


def _spans(sample: tar.Sample) -> tuple[tuple[int, int], tuple[int, int]]:
    return sample.fields["cls"], sample.fields["jpg"]


def write_files(shards: Shards, folder: Path) -> list[Path]:
    """One file a sample, in folders of a hundred; the list is in the order of the labels."""
    paths = []
    for label in range(shards.samples):
        path = folder / f"{label // 100:04d}" / f"{label:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shards.files[label % len(shards.files)])
        paths.append(path)
    os.sync()
    return paths
