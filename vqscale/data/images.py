"""From stored bytes to square uint8 images, and back."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vqscale.data.bad import BadSample
from vqscale.data.resize import resize

Pixels = NDArray[np.uint8]
Bytes = bytes | memoryview
"""A stored file; a view into a shard that is mapped into memory is read without a copy."""

MAX_PIXELS = 100_000_000
"""Larger images are taken for decompression bombs."""
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def decode(data: Bytes, size: int) -> Pixels:
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


def decode_into(data: Bytes, out: Pixels) -> None:
    """`decode` into a C-contiguous uint8 [size, size, 3]."""
    if data[:3] == _JPEG:
        if not _decode_jpeg(data, out):
            _fit(_open(data), out)
    elif not (data[:8] == _PNG and _decode_plain_png(data, out)):
        _fit(_open(data), out)


def decode_whole(data: Bytes, least: int) -> Pixels:
    """All of an image, uint8 [H, W, 3] RGB; a large JPEG is shrunk, but never below `least` pixels on its short side.

    Raises:
        BadSample: as `decode`.
    """
    if data[:3] == _JPEG:
        with suppress(ValueError):
            size = _jpeg_size(data)
            if size:
                return _shrunk_jpeg(data, size, least)
    return _pixels(_open(data))


def decode_each(files: Sequence[Bytes | None], out: Pixels) -> list[tuple[int, str]]:
    """Decode files one by one on the CPU; the `Decoder` of `ImageSource` where none is given.

    Args:
        files: stored files; None leaves a row as it is.
        out: uint8 [files, size, size, 3].

    Returns:
        (place, kind) of those that are bad.
    """
    bad = []
    for place, data in enumerate(files):
        if data is not None:
            try:
                decode_into(data, out[place])
            except BadSample as error:
                bad.append((place, error.kind))
    return bad


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


def probe(data: Bytes) -> tuple[str, int, int]:
    """Format (`jpeg`, `png`, `webp`), width and height, from the header alone.

    Raises:
        BadSample: `format` or `bomb`.
    """
    image = _open(data)
    return str(image.format).lower(), image.width, image.height


def _decode_jpeg(data: Bytes, out: Pixels) -> bool:
    """The fast way; False where Pillow has to judge: CMYK, and what simplejpeg refuses."""
    try:
        size = _jpeg_size(data)
        if not size:
            return False
        if size == out.shape[:2]:
            simplejpeg.decode_jpeg(data, buffer=out)
        else:
            resize(_centre(_shrunk_jpeg(data, size, out.shape[0])), out)
    except ValueError:
        return False
    return True


def _jpeg_size(data: Bytes) -> tuple[int, int] | None:
    """Height and width; None where Pillow has to decode. Raises BadSample, and ValueError where it is none."""
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if space in ("CMYK", "YCCK"):
        return None
    if height * width > MAX_PIXELS:
        raise BadSample("bomb")
    return height, width


def _shrunk_jpeg(data: Bytes, size: tuple[int, int], least: int) -> Pixels:
    """A JPEG of `size`, with `least` pixels or more on its short side where it has them. Raises ValueError."""
    scale = _scale(min(size), least)
    height, width = (-(-side // scale) for side in size)
    pixels: Pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=scale)
    return pixels


def _scale(side: int, size: int) -> int:
    """Factor 1, 2, 4 or 8 by which libjpeg may shrink while it decodes, so that `size` pixels or more are left.

    It then computes fewer coefficients of each 8×8 block. Other factors have no vectorised code and are slower than
    decoding everything.
    """
    return next((scale for scale in (8, 4, 2) if side >= scale * size), 1)


def _centre(image: Pixels) -> Pixels:
    """The centre square, as a view."""
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _decode_plain_png(data: Bytes, out: Pixels) -> bool:
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


def _open(data: Bytes) -> Image.Image:
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
    resize(_centre(_pixels(image)), out)


def _pixels(image: Image.Image) -> Pixels:
    try:
        return np.array(_rgb(image))  # a copy: torch takes no read-only memory
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
