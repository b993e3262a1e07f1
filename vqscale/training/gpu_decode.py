"""JPEGs decoded on the GPU, by torchvision (nvJPEG)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.data.images import MAX_PIXELS, Bytes, Pixels, decode_each
from vqscale.errors import UserError

_JPEG = b"\xff\xd8\xff"


class GpuDecoder:
    """An `image_source.Decoder` that decodes the JPEGs of a packet in one call, crops and resizes them on the GPU.

    The pixels come back to the loader's memory, so that bad samples are replaced and batches ordered as on the CPU; at
    256 pixels that is 0.2 MB an image each way. What nvJPEG does not take (other formats, CMYK, damaged files) is
    decoded, or refused, by the CPU. The pixels differ from the CPU's by rounding, since nvJPEG's inverse DCT and the
    resizing in floating point do.

    Args:
        device: a CUDA device.

    Raises:
        UserError: no CUDA device, or torchvision is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UserError(f"decoding on the GPU runs on {device.type}", where="data.decoder", mend="set it to cpu")
        self._device = device
        self._decode = _torchvision_decoder()
        self._streams = threading.local()  # one for each decoding thread, so that they do not wait for each other

    def __call__(self, files: Sequence[Bytes | None], out: Pixels) -> list[tuple[int, str]]:
        """Decode into uint8 [files, S, S, 3]; returns (place, kind) of the bad ones."""
        fit = [place for place, data in enumerate(files) if data is not None and _decodable(data)]
        done = self._decode_jpegs([files[place] for place in fit], fit, out) if fit else set()
        return decode_each([None if place in done else data for place, data in enumerate(files)], out)

    def _decode_jpegs(self, files: Sequence[Bytes | None], places: Sequence[int], out: Pixels) -> set[int]:
        """Decode some files into their rows; returns the rows that were filled (none where nvJPEG refuses one)."""
        size = out.shape[1]
        encoded = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in files if data is not None]
        with torch.cuda.stream(self._stream()):
            try:
                images = self._decode(encoded, device=self._device, mode="RGB")
            except RuntimeError:  # one damaged file fails the whole call: the CPU finds out which
                return set()
            rows = torch.stack([_fit(image, size) for image in images]).permute(0, 2, 3, 1).cpu().numpy()
        out[list(places)] = rows
        return set(places)

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._device)
        stream: torch.cuda.Stream = self._streams.own
        return stream


def _torchvision_decoder() -> Any:
    try:
        from torchvision.io import decode_jpeg
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UserError(
            f"torchvision cannot be imported ({error})",
            where="data.decoder",
            mend="install the torchvision that belongs to this torch, or set data.decoder to cpu",
        ) from None
    return decode_jpeg


def _decodable(data: Bytes) -> bool:
    """Whether the header is one of a JPEG of one or three channels and of bearable size."""
    if data[:3] != _JPEG:
        return False
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    return space not in ("CMYK", "YCCK") and height * width <= MAX_PIXELS


def _fit(image: Tensor, size: int) -> Tensor:
    """uint8 [3, H, W] to its centre square at [3, size, size]; bicubic with antialiasing, as `resize.resize`."""
    _, height, width = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square
    scaled = F.interpolate(square[None].float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].round().clamp(0, 255).to(torch.uint8)
