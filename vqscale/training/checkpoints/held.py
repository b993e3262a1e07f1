"""Pieces as torch.distributed.checkpoint (DCP) sees them: chunks of flat tensors.

DCP knows tensors that are whole and those that are cut along dimensions. Ranges of the flattened tensor, as ZeRO cuts
them, are neither; as chunks of a tensor with one dimension all strategies look alike, and DCP's own planners remove
replicas, share the writing among the ranks, and work out who reads what after a change of ranks or strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from vqscale.training.pieces import Piece

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the name in manifests and safetensors."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(tensor: Tensor) -> str:
    """Its dtype as manifests name it.

    Raises:
        TypeError: there is no such name.
    """
    if tensor.dtype not in _NAMES:
        raise TypeError(f"{tensor.dtype} cannot stand in a checkpoint")
    return _NAMES[tensor.dtype]


class Held:
    """All pieces that this rank holds of one tensor. The methods with underscores are DCP's protocol.

    Args:
        pieces: of one name; one or more.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        first = pieces[0]
        self.shape, self.dtype = first.shape, dtype_name(first.local)
        # A rank with nothing of a tensor has an empty piece. One of a tensor without elements is all there is of it.
        kept = [piece for piece in pieces if piece.local.numel() or not math.prod(first.shape)]
        self.pieces = {piece.start: replace(piece, local=piece.local.detach()) for piece in kept}
        self._scratch: dict[int, Tensor] = {}

    def size(self) -> torch.Size:
        """Of the flattened full tensor."""
        return torch.Size([math.prod(self.shape)])

    def values(self, start: int) -> Tensor:
        """Where the elements of the piece at `start` are to be written, flat; `settle` puts them in their places."""
        local = self.pieces[start].local
        if local.is_contiguous():
            return local.view(-1)
        return self._scratch.setdefault(start, torch.empty(local.numel(), dtype=local.dtype, device=local.device))

    def settle(self) -> None:
        """Bring what was written into the memory layout of its piece, such as channels_last."""
        for start, values in self._scratch.items():
            local = self.pieces[start].local
            local.copy_(values.view(local.shape))
        self._scratch.clear()

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size([start]), torch.Size([piece.local.numel()]))
            for start, piece in self.pieces.items()
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=DTYPES[self.dtype])
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


def hold(pieces: Iterable[Piece]) -> dict[str, Held]:
    """Pieces by name, sorted: what DCP calls a state dict."""
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.name, []).append(piece)
    return {name: Held(grouped[name]) for name in sorted(grouped)}
