"""From stored bytes to square uint8 images, and image shards as a source for the loader."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vqscale.data import storage, tar
from vqscale.data.bad import BadPick, BadSample
from vqscale.data.manifest import IMAGES, Manifest
from vqscale.data.source import Fields, Spec, read_in_batches
from vqscale.errors import UserError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Larger images are taken for decompression bombs."""
EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Members of a shard that hold the image, in the order in which they are looked for."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_NO_LABEL, _BAD_LABEL = -1, -2
_KEPT_INDEXES = 2_048


def decode(data: bytes, size: int) -> Pixels:
    """Decode a JPEG, PNG or WebP, cut its centre square and resize it.

    Args:
        data: the stored file.
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, 3] RGB.

    Raises:
        BadSample: `format`, `corrupt` or `bomb`.
    """
    out = np.empty((size, size, 3), np.uint8)
    decode_into(data, out)
    return out


def decode_into(data: bytes, out: Pixels) -> None:
    """`decode` into a C-contiguous uint8 [size, size, 3]."""
    if data.startswith(_JPEG):
        if not _decode_jpeg(data, out):
            _fit(_open(data), out)
    elif not (data.startswith(_PNG) and _decode_plain_png(data, out)):
        _fit(_open(data), out)


def encode_png(image: Pixels) -> bytes:
    """A lossless PNG whose rows are not filtered, which `decode` reads fastest.

    Args:
        image: uint8 [height, width, 3] RGB.
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)
    rows[:, 1:] = image.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    return _PNG + b"".join(_chunk(kind, content) for kind, content in parts)


def encode_jpeg(image: Pixels, quality: int) -> bytes:
    """A JPEG without subsampling of colour (4:4:4).

    Args:
        image: uint8 [height, width, 3] RGB.
        quality: 1 to 100.
    """
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="444"))


def probe(data: bytes) -> tuple[str, int, int]:
    """Format (`jpeg`, `png`, `webp`), width and height, from the header alone.

    Raises:
        BadSample: `format` or `bomb`.
    """
    image = _open(data)
    return str(image.format).lower(), image.width, image.height


def _decode_jpeg(data: bytes, out: Pixels) -> bool:
    """The fast way; False where Pillow has to judge: CMYK, and what simplejpeg refuses."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space in ("CMYK", "YCCK"):
            return False
        if height * width > MAX_PIXELS:
            raise BadSample("bomb")
        if (height, width) == out.shape[:2]:
            simplejpeg.decode_jpeg(data, buffer=out)
        else:
            _resize(Image.fromarray(simplejpeg.decode_jpeg(data)), out)
    except ValueError:
        return False
    return True


def _decode_plain_png(data: bytes, out: Pixels) -> bool:
    """The fast way for what `encode_png` writes at the wanted size; False for every other PNG."""
    size = out.shape[0]
    if data[8:29] != struct.pack(">I4sIIBBBBB", 13, b"IHDR", size, size, 8, 2, 0, 0, 0) or data[37:41] != b"IDAT":
        return False
    end = 41 + int.from_bytes(data[33:37], "big")
    if data[end + 8 : end + 12] != b"IEND" or zlib.crc32(data[37:end]) != int.from_bytes(data[end : end + 4], "big"):
        return False
    expander = zlib.decompressobj()
    try:
        rows = np.frombuffer(expander.decompress(data[41:end], size * (1 + 3 * size) + 1), np.uint8)
    except zlib.error:
        return False
    if rows.size != size * (1 + 3 * size):
        return False
    rows = rows.reshape(size, 1 + 3 * size)
    if rows[:, 0].any():  # some row is filtered
        return False
    out.reshape(size, 3 * size)[:] = rows[:, 1:]
    return True


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _open(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except Image.DecompressionBombError:
        raise BadSample("bomb") from None
    except Exception:
        raise BadSample("format") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadSample("bomb")
    return image


def _fit(image: Image.Image, out: Pixels) -> None:
    try:
        _resize(_rgb(image), out)
    except BadSample:
        raise
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadSample("corrupt") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; what is transparent shows white."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        deep = np.asarray(image).astype(np.int64)
        return Image.fromarray((deep >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        seen = image.convert("RGBA")
        ground = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(ground, seen).convert("RGB")
    return image.convert("RGB")


def _resize(image: Image.Image, out: Pixels) -> None:
    size = out.shape[0]
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # resize(box=...) would see beyond the box
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    out[:] = np.asarray(square)


class _Index(NamedTuple):
    """Where the images of one shard lie, and their labels."""

    spans: list[tuple[int, int]]
    """Offset and size in bytes; size -1 where a sample has no image."""
    labels: list[int]
    keys: list[str]


class ImageSource:
    """Image shards at one size.

    Fields: `image` uint8 [S, S, 3] RGB, and `label` int64, which is -1 where a sample has none.

    Args:
        url: folder of the shards.
        manifest: their manifest.
        size: side S of the images; stored images of another size are cropped and resized.
    """

    def __init__(self, url: str, manifest: Manifest, size: int) -> None:
        if manifest.format != IMAGES:
            raise UserError(f"holds {manifest.format}, not images", where=url, mend="name a folder of image shards")
        self.url, self.manifest, self.size = url, manifest, size
        self.spec = {
            "image": Spec((size, size, 3), np.dtype(np.uint8)),
            "label": Spec((), np.dtype(np.int64)),
        }
        self._indexes: OrderedDict[int, _Index] = OrderedDict()

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return self.manifest.shards[shard].name

    def open_group(self, shards: Sequence[int]) -> ImageGroup:
        """Open shards for random access; a shard's index is built once and kept."""
        return ImageGroup(self, [(shard, *self._open(shard)) for shard in shards])

    def read_shard(
        self, shard: int, batch: int, bad: list[BadPick] | None = None
    ) -> Iterator[tuple[Fields, list[str]]]:
        """The samples of a shard in order, as (fields, keys) of up to `batch`; see `read_in_batches`."""
        return read_in_batches(self, shard, self.manifest.counts[shard], batch, bad)

    def _open(self, shard: int) -> tuple[storage.Buffer, _Index]:
        where = storage.join(self.url, self.name(shard))
        buffer = storage.open_shard(where)
        index = self._indexes.pop(shard, None) or _build_index(buffer, where, len(self.manifest.classes))
        self._indexes[shard] = index
        while len(self._indexes) > _KEPT_INDEXES:
            self._indexes.popitem(last=False)
        expected = self.manifest.shards[shard].samples
        if len(index.keys) != expected:
            raise UserError(
                f"holds {len(index.keys)} samples, its manifest says {expected}",
                where=where,
                mend="copy it again, or write the shards again",
            )
        return buffer, index


class ImageGroup:
    """Open shards whose samples are numbered through."""

    def __init__(self, source: ImageSource, opened: list[tuple[int, storage.Buffer, _Index]]) -> None:
        self._source, self._opened = source, opened
        counts = np.array([len(index.keys) for _, _, index in opened])
        self._starts = np.cumsum(counts) - counts

    def keys(self, picks: NDArray[np.int64]) -> list[str]:
        """Keys of samples by number within the group."""
        return [self._opened[place][2].keys[at] for place, at in self._locate(picks)]

    def read(self, picks: NDArray[np.int64], out: Fields, row: int) -> list[BadPick]:
        """Decode samples into the rows from `row` on; the rows of bad ones hold nothing of use."""
        bad = []
        images, labels = out["image"], out["label"]
        for number, (place, at) in enumerate(self._locate(picks)):
            shard, buffer, index = self._opened[place]
            try:
                labels[row + number] = _checked(index.labels[at])
                offset, size = index.spans[at]
                if size < 0:
                    raise BadSample("missing")
                decode_into(buffer[offset : offset + size], images[row + number])
            except BadSample as error:
                bad.append(BadPick(number, self._source.name(shard), index.keys[at], error.kind))
        return bad

    def _locate(self, picks: NDArray[np.int64]) -> Iterable[tuple[int, int]]:
        """Place of the shard among the open ones, and index within it."""
        places = np.searchsorted(self._starts, picks, side="right") - 1
        return zip(places.tolist(), (picks - self._starts[places]).tolist(), strict=True)


def _checked(label: int) -> int:
    if label == _BAD_LABEL:
        raise BadSample("label")
    return label


def _build_index(buffer: storage.Buffer, where: str, classes: int) -> _Index:
    spans, labels, keys = [], [], []
    for key, fields in tar.samples(buffer, where):
        keys.append(key)
        spans.append(next((fields[name] for name in EXTENSIONS if name in fields), (0, -1)))
        labels.append(_label(buffer, fields, classes))
    return _Index(spans, labels, keys)


def _label(buffer: storage.Buffer, fields: dict[str, tuple[int, int]], classes: int) -> int:
    """The class from `.cls` (digits) or `.json` ({"label": n}); -1 when neither says one."""
    value: Any = None
    try:
        if "cls" in fields:
            offset, size = fields["cls"]
            value = int(buffer[offset : offset + size])
        elif "json" in fields:
            offset, size = fields["json"]
            value = json.loads(buffer[offset : offset + size]).get("label")
    except (ValueError, AttributeError):
        return _BAD_LABEL
    if value is None:
        return _NO_LABEL
    if not isinstance(value, int) or value < 0 or (classes and value >= classes):
        return _BAD_LABEL
    return value


def read_labels(where: str) -> list[int]:
    """Labels of all samples of an image shard; -1 for none, -2 for what is no label."""
    return _build_index(storage.open_shard(where), where, 0).labels
