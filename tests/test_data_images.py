import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.data_helpers import picture
from vqscale.data import images
from vqscale.data.bad import BadSample


def encoded(image: Image.Image, form: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def test_png_round_trip_is_exact_both_ways():
    pixels = picture(5, 16)
    assert (images.decode(images.encode_png(pixels), 16) == pixels).all()
    assert (np.asarray(Image.open(io.BytesIO(images.encode_png(pixels)))) == pixels).all()
    theirs = encoded(Image.fromarray(pixels), "PNG")
    assert (images.decode(theirs, 16) == pixels).all()


def test_jpeg_is_decoded_as_simplejpeg_does():
    data = images.encode_jpeg(picture(5, 16), 95)
    assert (images.decode(data, 16) == simplejpeg.decode_jpeg(data)).all()
    assert simplejpeg.decode_jpeg_header(data)[3] == "444"


def test_crops_the_centre_before_resizing():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (10, 200, 30)
    for form, how in (("PNG", {}), ("WEBP", {"lossless": True})):
        for size in (10, 5):
            pixels = images.decode(encoded(Image.fromarray(wide), form, **how), size)
            assert np.abs(pixels.astype(int) - (10, 200, 30)).max() <= 1
    tall = images.decode(images.encode_jpeg(wide.swapaxes(0, 1), 95), 4)
    assert np.abs(tall.astype(int) - (10, 200, 30)).max() < 6


@pytest.mark.parametrize(
    ("mode", "colour", "form", "expected"),
    [
        ("L", 77, "PNG", (77, 77, 77)),
        ("L", 77, "JPEG", (77, 77, 77)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("I;16", 77 * 256, "PNG", (77, 77, 77)),
        ("LA", (77, 255), "PNG", (77, 77, 77)),
        ("RGBA", (9, 9, 9, 0), "PNG", (255, 255, 255)),
        ("RGBA", (200, 100, 50, 255), "WEBP", (200, 100, 50)),
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)),
        ("RGB", (200, 100, 50), "JPEG", (200, 100, 50)),
    ],
)
@pytest.mark.parametrize("size", [8, 4])
def test_every_mode_becomes_rgb(mode: str, colour, form: str, expected: tuple, size: int):
    data = encoded(Image.new(mode, (8, 8), colour), form, **({"lossless": True} if form == "WEBP" else {}))
    pixels = images.decode(data, size)
    assert pixels.shape == (size, size, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= 3


def test_palette_and_transparent_palette():
    image = Image.new("RGB", (8, 8), (10, 20, 30)).quantize(4)
    assert (images.decode(encoded(image, "PNG"), 8) == (10, 20, 30)).all()
    assert (images.decode(encoded(image, "PNG", transparency=0), 8) == 255).all()


def _huge_png() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_data_has_a_kind():
    png, jpeg = images.encode_png(picture(1, 16)), images.encode_jpeg(picture(1, 16), 95)
    broken = bytearray(png)
    broken[60] ^= 0xFF
    cases = {
        b"": "format",
        b"hello": "format",
        png[:-30]: "corrupt",
        bytes(broken): "corrupt",
        jpeg[:-20]: "corrupt",
        _huge_png(): "bomb",
    }
    for data, kind in cases.items():
        with pytest.raises(BadSample) as error:
            images.decode(data, 16)
        assert error.value.kind == kind, data[:8]


def test_a_row_that_expands_without_end_is_not_followed():
    rows = zlib.compress(bytes(50_000_000))
    data = images.encode_png(np.zeros((8, 8, 3), np.uint8))
    bomb = data[:33] + images._chunk(b"IDAT", rows) + images._chunk(b"IEND", b"")
    pixels = images.decode(bomb, 8)  # Pillow reads the rows that the header promises
    assert (pixels == 0).all()
