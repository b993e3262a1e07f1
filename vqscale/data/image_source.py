"""Image shards as a source for the loader."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqscale import storage
from vqscale.data import tar
from vqscale.data.bad import BadPick, BadSample
from vqscale.data.crops import Crops
from vqscale.data.images import Bytes, Pixels, decode_each
from vqscale.data.labels import NO_LABEL, label_number, stored_label
from vqscale.data.manifest import IMAGES, Manifest
from vqscale.data.shards import ShardSet
from vqscale.data.source import Fields, Spec, read_in_batches
from vqscale.errors import UserError
from vqscale.storage.store import Store

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Members of a shard that hold the image, in the order in which they are looked for."""

Decoder = Callable[[Sequence[Bytes | None], Pixels], list[tuple[int, str]]]
"""Decodes files into uint8 [files, S, S, 3] and returns (place, kind) of the bad ones; see `images.decode_each`."""

_KEPT_SAMPLES = 1_000_000  # samples whose place in their shard is remembered, about 300 bytes each


@dataclass(frozen=True)
class _Index:
    """Where the images of one shard lie, and their labels."""

    keys: list[str]
    spans: list[tuple[int, int]]
    """Offset and size in bytes."""
    labels: list[int]
    bad: dict[int, str]
    """Number of a sample that cannot be used → kind."""


class ImageSource:
    """Image shards at one size.

    Fields: `image` uint8 [S, S, 3] RGB, and `label` int64, which is -1 where a sample has none.

    Args:
        shards: the shards.
        size: side S of the images; stored images of another size are cropped and resized.
        store: opens the shards.
        decoder: decodes the images of a packet; by default one by one on the CPU.
        crops: several squares of each image, decoded on the CPU: `image` is uint8 [count, S, S, 3] then.
    """

    def __init__(
        self,
        shards: ShardSet,
        size: int,
        store: Store | None = None,
        decoder: Decoder = decode_each,
        crops: Crops | None = None,
    ) -> None:
        if shards.manifest.format != IMAGES:
            raise UserError(
                f"holds {shards.manifest.format}, not images", where=shards.spec, mend="name a folder of image shards"
            )
        self.shards, self.size, self.decoder, self.crops = shards, size, decoder, crops
        self.store = store or Store()
        self.spec = {
            "image": Spec((*((crops.count,) if crops else ()), size, size, 3), np.dtype(np.uint8)),
            "label": Spec((), np.dtype(np.int64)),
        }
        self._numbers = {name: number for number, name in enumerate(shards.manifest.classes)}
        self._indexes: OrderedDict[int, _Index] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def manifest(self) -> Manifest:
        """What the shards hold."""
        return self.shards.manifest

    def name(self, shard: int) -> str:
        """Name of a shard in messages."""
        return self.shards.name(shard)

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Size of some shards together."""
        return sum(self.manifest.shards[shard].bytes for shard in shards)

    def open_group(self, shards: Sequence[int]) -> ImageGroup:
        """Open shards for random access; a shard's index is built once and kept. Any number of threads may call it.

        Raises:
            UserError: a shard is absent, cannot be read, or is another one than the manifest says.
        """
        return ImageGroup(self, [(shard, *self._open(shard)) for shard in shards])

    def read_shard(
        self, shard: int, batch: int, bad: list[BadPick] | None = None
    ) -> Iterator[tuple[Fields, list[str]]]:
        """The samples of a shard in order, as (fields, keys) of up to `batch`; see `read_in_batches`."""
        return read_in_batches(self, shard, self.manifest.counts[shard], batch, bad)

    def _open(self, shard: int) -> tuple[memoryview, _Index]:
        where, stated = self.shards.urls[shard], self.manifest.shards[shard]
        # Without the size: of a shard that was cut off, what is left is used.
        buffer = self.store.open(where, sha256=stated.sha256)
        with self._lock:
            index = self._indexes.pop(shard, None)
        index = index or self._build(buffer, shard)
        with self._lock:
            self._indexes[shard] = index
            while sum(len(kept.keys) for kept in self._indexes.values()) > _KEPT_SAMPLES and len(self._indexes) > 1:
                self._indexes.popitem(last=False)
        return memoryview(buffer), index

    def _build(self, buffer: storage.Buffer, shard: int) -> _Index:
        """The index; of a shard that is cut off or damaged, as far as it is whole."""
        where, stated, rule = self.shards.urls[shard], self.manifest.shards[shard].samples, self.shards.labels[shard]
        samples, fault = tar.whole_samples(buffer, where)
        if fault:
            del samples[-1:]  # it may lack members
        if len(samples) > stated or (len(samples) < stated and not fault):
            raise UserError(
                f"holds {len(samples)} samples, its manifest says {stated}",
                where=where,
                mend="copy it again, or write the shards again",
            )
        index = _Index([], [], [], {})
        for number, sample in enumerate(samples):
            span, label = (0, 0), NO_LABEL
            try:
                span = _span(sample)
                value = stored_label(buffer, sample, rule)
                label = label_number(value, self.manifest.classes, self._numbers)
            except BadSample as error:
                index.bad[number] = error.kind
            index.keys.append(sample.key)
            index.spans.append(span)
            index.labels.append(label)
        for number in range(len(samples), stated):
            index.bad[number] = "truncated"
            index.keys.append(f"#{number}")
            index.spans.append((0, 0))
            index.labels.append(NO_LABEL)
        return index


class ImageGroup:
    """Open shards whose samples are numbered through."""

    def __init__(self, source: ImageSource, opened: list[tuple[int, memoryview, _Index]]) -> None:
        self._source, self._opened = source, opened
        counts = np.array([len(index.keys) for _, _, index in opened])
        self._starts = np.cumsum(counts) - counts

    def keys(self, picks: NDArray[np.int64]) -> list[str]:
        """Keys of samples by number within the group."""
        return [self._opened[place][2].keys[at] for place, at in self._locate(picks)]

    def read(self, picks: NDArray[np.int64], out: Fields, row: int) -> list[BadPick]:
        """Decode samples into the rows from `row` on; the rows of bad ones hold nothing of use."""
        places = self._locate(picks)
        labels, kinds = out["label"], {}
        files: list[Bytes | None] = []
        for number, (place, at) in enumerate(places):
            _, buffer, index = self._opened[place]
            labels[row + number] = index.labels[at]
            offset, size = index.spans[at]
            files.append(None if at in index.bad else buffer[offset : offset + size])
            if at in index.bad:
                kinds[number] = index.bad[at]
        images, crops = out["image"][row : row + len(picks)], self._source.crops
        kinds.update(
            crops.decode_each(files, self.keys(picks), images) if crops else self._source.decoder(files, images)
        )
        return [self._bad(number, *places[number], kind) for number, kind in sorted(kinds.items())]

    def _bad(self, number: int, place: int, at: int, kind: str) -> BadPick:
        shard, _, index = self._opened[place]
        return BadPick(number, self._source.name(shard), index.keys[at], kind)

    def _locate(self, picks: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Place of the shard among the open ones, and index within it."""
        places = np.searchsorted(self._starts, picks, side="right") - 1
        return list(zip(places.tolist(), (picks - self._starts[places]).tolist(), strict=True))


def leads_outside(key: str) -> bool:
    """Whether a sample's key is an absolute path, or leads to a parent folder."""
    return key[0] == "/" or (".." in key and "/../" in f"/{key}/")


def image_extension(sample: tar.Sample) -> str | None:
    """Extension of the member that holds the sample's image; None where there is none."""
    return next((extension for extension in EXTENSIONS if extension in sample.fields), None)


def _span(sample: tar.Sample) -> tuple[int, int]:
    """Offset and size of the sample's image.

    Raises:
        BadSample: `path` or `missing`.
    """
    if leads_outside(sample.key):
        raise BadSample("path")  # nothing is ever unpacked, but keys become names of files downstream
    extension = image_extension(sample)
    if extension is None:
        raise BadSample("missing")
    return sample.fields[extension]
