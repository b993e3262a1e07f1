"""Others that search nearest codes, or train a codebook by EMA, on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Contender


def find(module: str, package: str) -> Any:
    """A peer's module, or in words why it cannot be used."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"cannot be imported ({error}); pip install {package}"


class Faiss:
    """Exact search in a flat index, on `threads` threads of its own."""

    def __init__(self, faiss: Any, codes: Tensor, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self._index = faiss.IndexFlatL2(codes.shape[1])
        self._index.add(codes.numpy())

    def search(self, rows: Tensor) -> Tensor:
        """Nearest codes int64 [N] of rows fp32 [N, D]."""
        return torch.from_numpy(self._index.search(rows.numpy(), 1)[1][:, 0])

    def contender(self, name: str, source: Iterator[Tensor]) -> Contender:
        """Searches the rows of the next latents [B, D, H, W]."""
        return Contender(name, lambda: len(self.search(as_rows(next(source)))))


class VectorQuantizePytorch:
    """`VectorQuantize` in training: search, quantized latents, loss, and the codebook's EMA."""

    def __init__(self, package: Any, codes: Tensor) -> None:
        self._quantize = package.VectorQuantize(dim=codes.shape[1], codebook_size=len(codes)).train()
        self._quantize.codebook = codes.clone()

    def step(self, latents: Tensor) -> Tensor:
        """Codes int64 [N] of latents [B, D, H, W]; moves the codebook."""
        tokens = latents.permute(0, 2, 3, 1).flatten(1, 2)  # a view, the layout that it asks for
        codes: Tensor = self._quantize(tokens)[1]
        return codes.flatten()

    def contender(self, name: str, source: Iterator[Tensor]) -> Contender:
        """Trains on the next latents [B, D, H, W]."""
        return Contender(name, lambda: len(self.step(next(source))))


def as_rows(latents: Tensor) -> Tensor:
    """[B, D, H, W] in channels-last memory as [N, D], without a copy."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)
