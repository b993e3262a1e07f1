"""Batches from the loader's memory to the device, ahead of their use where the device works on its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.data.loader import Batch, Loader
from vqscale.errors import UserError


@dataclass(frozen=True)
class DeviceBatch:
    """Samples of one step on one rank, on its device."""

    step: int
    fields: dict[str, Tensor]
    """`image` uint8 [B, S, S, 3], or codes uint16 [B, side, side] or posteriors by level; `label` int64 [B]."""
    index: Tensor
    """int64 [B], on the CPU: place of each sample in the global batch."""

    def split(self, size: int | None) -> list[DeviceBatch]:
        """Micro-batches of `size` samples, in order; None: the batch as it is.

        Raises:
            UserError: they cannot have the same size.
        """
        held = len(self.index)
        if size is None or size == held:
            return [self]
        if held % size:
            raise UserError(f"{size} does not divide the {held} samples of a rank", where="training.micro_batch")
        parts = [slice(start, start + size) for start in range(0, held, size)]
        return [
            DeviceBatch(self.step, {name: values[part] for name, values in self.fields.items()}, self.index[part])
            for part in parts
        ]


class DeviceBatches:
    """Iterates over a loader's batches on a device.

    On a GPU each batch is copied on a stream of its own while the step before it is computed; the loader's memory
    should be pinned for that (`pinned`). On the CPU the tensors are the loader's memory.

    Args:
        loader: endless batches.
        device: where they go.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader, self._device = loader, device

    @property
    def wait_s(self) -> float:
        """Seconds that were spent waiting for the loader."""
        return self._loader.wait_s

    @property
    def read(self) -> int:
        """Samples that the loader delivered."""
        return self._loader.read

    @property
    def bad(self) -> Mapping[str, int]:
        """Kind → bad samples so far."""
        return self._loader.bad

    @property
    def bad_samples(self) -> list[tuple[str, str, str]]:
        """(shard, key, kind) of the bad samples so far."""
        return self._loader.bad_samples

    def __iter__(self) -> Iterator[DeviceBatch]:
        if self._device.type == "cuda":
            return self._ahead()
        return (_on(batch, self._device) for batch in self._loader)

    def _ahead(self) -> Iterator[DeviceBatch]:
        """One batch ahead on a stream of its own; a batch's memory is held until its copy is done."""
        stream = torch.cuda.Stream(self._device)
        waiting: tuple[DeviceBatch, torch.cuda.Event, Batch] | None = None
        for batch in self._loader:
            with torch.cuda.stream(stream):
                copied = _on(batch, self._device)
                done = torch.cuda.Event()
                done.record()
            if waiting is not None:
                yield self._due(waiting)
            waiting = (copied, done, batch)

    def _due(self, waiting: tuple[DeviceBatch, torch.cuda.Event, Batch]) -> DeviceBatch:
        copied, done, _ = waiting
        # The host waits, not only the stream: after this the loader may write into the batch's memory. The copy was
        # given a whole step, so it has nearly always ended.
        done.synchronize()
        compute = torch.cuda.current_stream(self._device)
        for tensor in copied.fields.values():
            tensor.record_stream(compute)  # made on the other stream: the allocator must not give it away too early
        return copied


def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array in pinned memory, from which a GPU copies without waiting for the CPU (`Loader(allocate=...)`)."""
    memory = torch.empty(int(np.prod(shape)) * dtype.itemsize, dtype=torch.uint8, pin_memory=True)
    array: NDArray[Any] = memory.numpy().view(dtype).reshape(shape)
    return array


def tensors(fields: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Fields on a device; on the CPU the same memory."""
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in fields.items()}


def _on(batch: Batch, device: torch.device) -> DeviceBatch:
    return DeviceBatch(batch.step, tensors(batch.fields, device), torch.from_numpy(batch.index))
