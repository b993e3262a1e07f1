"""Other loaders, set up to deliver what ours does: uint8 [batch, size, size, 3] RGB and the label of each image.

All cut the centre square and resize it with antialiasing; two worker processes each, default collation. None of them
shuffles but the image folder, whose sampler costs next to nothing.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.loader_data import Shards

Pixels = NDArray[np.uint8]
Sample = tuple[Any, int]


@dataclass(frozen=True)
class Delivery:
    """What every loader is asked for."""

    size: int
    batch: int
    workers: int

    def arguments(self) -> dict[str, Any]:
        """The arguments of torch's DataLoader."""
        # Forked, also where another way of starting is the default, so that all start alike and at once.
        return {"batch_size": self.batch, "num_workers": self.workers, "multiprocessing_context": "fork"}


class Feed:
    """Batches (images, labels) of a loader, for as long as they are wanted.

    Args:
        batches: the loader's iterator.
        close: ends it; by default its workers end with its last reference.
    """

    def __init__(self, batches: Iterator[Any], close: Callable[[], object] = lambda: None) -> None:
        self._batches: Iterator[Any] | None = batches
        self._close = close

    def read(self, images: int) -> int:
        """Take batches until there are so many images; returns how many there were."""
        taken = 0
        while taken < images:
            taken += len(self.batch()[1])
        return taken

    def batch(self) -> tuple[Any, Any]:
        """The next batch."""
        assert self._batches is not None, "the feed is closed"
        images, labels = next(self._batches)
        return images, labels

    def close(self) -> None:
        """End the loader and its workers."""
        self._batches = None
        self._close()


def shorter_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height after the shorter side was resized, as `torchvision.transforms.Resize` rounds them."""
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    return (size, other) if width <= height else (other, size)


def fit_pil(image: Image.Image, size: int) -> Pixels:
    """Resize the shorter side (bilinear, antialiased) and crop the centre, as torchvision does on a Pillow image."""
    if image.size != (size, size):
        width, height = shorter_side(*image.size, size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return np.array(image)


def decode_pil(data: bytes | memoryview | Path, size: int) -> Pixels:
    """A JPEG through Pillow alone."""
    with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
        return fit_pil(image.convert("RGB"), size)


def decode_simplejpeg(data: bytes, size: int) -> Any:
    """A JPEG through libjpeg-turbo; resized, where needed, by torch's vectorised kernel on the cropped view."""
    pixels = simplejpeg.decode_jpeg(data)
    height, width, _ = pixels.shape
    if height == width == size:
        return pixels
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous()


def webdataset_pil(shards: Shards, how: Delivery) -> Feed:
    """Webdataset as its documentation shows it: `decode("pil")`, a transform, torch's DataLoader."""
    return _webdataset(shards, how, "pil", partial(fit_pil, size=how.size))


def webdataset_simplejpeg(shards: Shards, how: Delivery) -> Feed:
    """Webdataset with the fastest decoding that we know of."""
    decoder = wds.handle_extension("jpg", partial(decode_simplejpeg, size=how.size))
    return _webdataset(shards, how, decoder, _same)


def _webdataset(shards: Shards, how: Delivery, decoder: Any, transform: Callable[[Any], Any]) -> Feed:
    dataset = (
        wds.WebDataset([str(path) for path in shards.paths], shardshuffle=False)
        .decode(decoder)
        .to_tuple("jpg", "cls")
        .map_tuple(transform, _same)
        .repeat()
    )
    return Feed(iter(DataLoader(dataset, **how.arguments())))


def _same(value: Any) -> Any:
    return value


class ImageFiles(Dataset[Sample]):
    """One file an image, as `torchvision.datasets.ImageFolder` reads them; the label is the place in the list."""

    def __init__(self, paths: list[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Sample:
        return decode_pil(self.paths[number], self.size), number


class EndlessShuffle(Sampler[int]):
    """One permutation after the other, so that no epoch ends."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng(0)
        while True:
            yield from rng.permutation(self.count).tolist()


def image_folder(paths: list[Path], how: Delivery) -> Feed:
    """Files, Pillow, torch's DataLoader."""
    files = ImageFiles(paths, how.size)
    return Feed(iter(DataLoader(files, sampler=EndlessShuffle(len(paths)), **how.arguments())))


def find_litdata() -> ModuleType | str:
    """LitData, or why it cannot be used."""
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it would ask the package registry
    try:
        return importlib.import_module("litdata")
    except (ImportError, RuntimeError) as error:  # the latter where its torchvision does not fit torch
        return f"cannot be imported ({error}); pip install -c constraints.txt -e '.[bench]'"


def write_litdata(litdata: ModuleType, shards: Shards, folder: Path) -> Path:
    """The same samples, in as many chunks of LitData as there are tars."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(folder.with_name("litdata-chunks"))
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(folder.with_name("litdata-data"))
    samples = [(shards.files[label % len(shards.files)], label) for label in range(shards.samples)]
    litdata.optimize(
        _litdata_item,
        samples,
        str(folder),
        chunk_size=shards.per_shard,
        num_workers=1,
        verbose=False,
        start_method="fork",  # it becomes the default of the whole process
    )
    os.sync()
    return folder


def _litdata_item(sample: tuple[bytes, int]) -> dict[str, Any]:
    return {"image": sample[0], "label": sample[1]}


def litdata_pil(litdata: ModuleType, folder: Path, how: Delivery) -> Feed:
    """LitData's dataset and loader, Pillow; one epoch."""
    dataset = litdata.StreamingDataset(str(folder), transform=partial(_litdata_sample, size=how.size))
    return Feed(iter(litdata.StreamingDataLoader(dataset, **how.arguments())))


def _litdata_sample(item: dict[str, Any], size: int) -> Sample:
    return decode_pil(item["image"], size), item["label"]


def walk_webdataset(shards: Shards) -> Iterable[dict[str, Any]]:
    """The samples of tars, undecoded, as webdataset reads them: key and content of each member."""
    samples: Iterable[dict[str, Any]] = wds.WebDataset([str(path) for path in shards.paths], shardshuffle=False)
    return samples
