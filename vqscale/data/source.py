"""What the loader asks of shards of any kind: open some of them, and read samples of these into a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vqscale.data.bad import BadPick
from vqscale.data.memory import aligned
from vqscale.errors import UserError
from vqscale.storage.store import Store

Fields = dict[str, NDArray[Any]]
"""Arrays by field name; the first axis counts samples."""


class Spec(NamedTuple):
    """Shape and dtype of one sample's field."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def empty(self, samples: int) -> NDArray[Any]:
        """Memory for so many samples."""
        return aligned((samples, *self.shape), self.dtype)


class OpenGroup(Protocol):
    """Open shards whose samples are numbered through, in the order in which the shards were named.

    They are released with the last reference.
    """

    def read(self, picks: NDArray[np.int64], out: Fields, row: int) -> list[BadPick]:
        """Read samples by number into the rows from `row` on; called from several threads."""
        ...

    def keys(self, picks: NDArray[np.int64]) -> list[str]:
        """Keys of samples by number."""
        ...


class Source(Protocol):
    """Shards of one kind, such as `image_source.ImageSource` and `codes.CodeSource`."""

    @property
    def store(self) -> Store:
        """Opens the shards."""
        ...

    @property
    def spec(self) -> dict[str, Spec]:
        """What a sample consists of."""
        ...

    def name(self, shard: int) -> str:
        """Name of a shard in messages."""
        ...

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Size of some shards together."""
        ...

    def open_group(self, shards: Sequence[int]) -> OpenGroup:
        """Open shards for random access; called from several threads."""
        ...


def read_in_batches(
    source: Source, shard: int, samples: int, batch: int, bad: list[BadPick] | None = None
) -> Iterator[tuple[Fields, list[str]]]:
    """All samples of a shard in order, as (fields, keys) of up to `batch` samples.

    Args:
        source: the shards.
        shard: which of them.
        samples: how many it holds.
        batch: samples that are read at once.
        bad: bad samples are left out and listed here; without a list, the first one is an error.

    Raises:
        UserError: a bad sample, and no list was given.
    """
    group = source.open_group([shard])
    for start in range(0, samples, batch):
        picks = np.arange(start, min(samples, start + batch))
        fields = {name: spec.empty(len(picks)) for name, spec in source.spec.items()}
        found = group.read(picks, fields, 0)
        if found and bad is None:
            raise UserError(f"sample {found[0].key} is bad ({found[0].kind})", where=found[0].shard)
        if bad is not None:
            bad.extend(found)
        picks, fields = without(found, picks, fields)
        yield fields, group.keys(picks)


def without(bad: Sequence[BadPick], picks: NDArray[np.int64], fields: Fields) -> tuple[NDArray[np.int64], Fields]:
    """Samples by number, and their fields, less the bad ones among them."""
    if not bad:
        return picks, fields
    good = np.delete(np.arange(len(picks)), [pick.place for pick in bad])
    return picks[good], {name: values[good] for name, values in fields.items()}
