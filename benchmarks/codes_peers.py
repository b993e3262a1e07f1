"""Code grids as others keep them: one `.npy` file an image and level, and LitData's chunks of samples."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.data.codes import empty_fields
from vqscale.data.manifest import CodeLevel
from vqscale.data.source import Fields

Grids = Mapping[str, NDArray[np.uint16]]
"""Level name → codes [samples, side, side]; sample i has the label i."""


def write_files(folder: Path, grids: Grids) -> list[str]:
    """A file for each sample and level, as LlamaGen has them; returns their paths without `.LEVEL.npy`."""
    found = []
    for row in range(_samples(grids)):
        path = folder / f"{row // 1000:04d}" / f"{row:08d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, array in grids.items():
            np.save(f"{path}.{name}.npy", array[row])
        found.append(str(path))
    return found


def from_files(
    files: Sequence[str], levels: Sequence[CodeLevel], picks: NDArray[np.int64], batch: int
) -> Iterator[Fields]:
    """Batches in the order of `picks`."""
    names = [level.name for level in levels]
    samples = ({"label": pick, **{name: np.load(f"{files[pick]}.{name}.npy") for name in names}} for pick in picks)
    return _batches(samples, levels, batch)


def write_litdata(litdata: ModuleType, folder: Path, grids: Grids, chunk: int) -> Path:
    """Samples of arrays, in chunks of so many samples, by LitData's own writer."""
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(folder.with_name("litdata-chunks"))
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(folder.with_name("litdata-data"))
    litdata.optimize(
        partial(_litdata_item, grids),
        list(range(_samples(grids))),
        str(folder),
        chunk_size=chunk,
        num_workers=1,
        verbose=False,
        start_method="fork",  # it becomes the default of the whole process
    )
    return folder


def from_litdata(litdata: ModuleType, folder: Path, levels: Sequence[CodeLevel], batch: int) -> Iterator[Fields]:
    """Batches of a pass that LitData shuffles, in this process."""
    return _batches(litdata.StreamingDataset(str(folder), shuffle=True), levels, batch)


def _litdata_item(grids: Grids, row: int) -> dict[str, Any]:
    return {"label": row, **{name: array[row] for name, array in grids.items()}}


def _batches(samples: Iterable[Mapping[str, Any]], levels: Sequence[CodeLevel], batch: int) -> Iterator[Fields]:
    """Samples copied into batches, whose memory is used again; the last one may be smaller."""
    out, row = empty_fields(levels, batch), 0
    for sample in samples:
        for name, array in out.items():
            array[row] = sample[name]
        row += 1
        if row == batch:
            yield out
            row = 0
    if row:
        yield {name: array[:row] for name, array in out.items()}


def _samples(grids: Grids) -> int:
    return len(next(iter(grids.values())))
