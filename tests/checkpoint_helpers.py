"""Small states of a training for tests of checkpoints, whole or cut up as strategies cut them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.training_helpers import Fixed, Kept
from vqscale.checkpoint.manifest import SUBMITTED
from vqscale.training.checkpoints.keeper import Checkpoints
from vqscale.training.pieces import Piece, whole

CPU = torch.device("cpu")


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Every kind that occurs: kernels in channels_last, scalars, an empty one, other dtypes, odd bits."""
    draw = torch.Generator().manual_seed(seed)
    kernel = torch.randn(6, 3, 5, 5, generator=draw).to(memory_format=torch.channels_last)
    odd = torch.randn(7, generator=draw)
    odd[:4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    return {
        "model/kernel": kernel,
        "model/table": torch.randn(40, 9, generator=draw),
        "model/odd": odd,
        "model/half": torch.randn(5, 3, generator=draw).bfloat16(),
        "model/steps": torch.tensor(7 + seed),
        "model/used": torch.rand(11, generator=draw) > 0.5,
        "model/none": torch.zeros(0, 4),
        "optimizer/adamw/exp_avg/kernel": torch.randn(6, 3, 5, 5, generator=draw).to(memory_format=torch.channels_last),
        "optimizer/adamw/step/kernel": torch.tensor(3.0 + seed),
    }


def zeros(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the values, in the same memory layout."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def bits(state: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """What has to be equal: dtype, shape, and every bit, in row-major order."""
    return {
        name: (value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, value in state.items()
    }


def cut(state: Mapping[str, Tensor], how: str, rank: int, world: int) -> list[Piece]:
    """Pieces of a rank: `whole` as under DDP, `rows` as under FSDP, `ranges` as under ZeRO; scalars are whole."""
    if how == "whole":
        return [whole(name, value) for name, value in state.items()]
    found = []
    for name, value in state.items():
        if not value.dim():
            found.append(whole(name, value))
        elif how == "rows":
            per = math.ceil(len(value) / world)
            part = value[rank * per : (rank + 1) * per]
            width = value.numel() // len(value) if len(value) else 0
            found.append(Piece(name, tuple(value.shape), min(rank * per, len(value)) * width, part))
        else:
            flat = value.contiguous().view(-1)
            first, end = (flat.numel() * n // world for n in (rank, rank + 1))
            if end > first or not flat.numel():  # a rank does not even know of what it holds nothing of
                found.append(Piece(name, tuple(value.shape), first, flat[first:end].clone()))
    return found


def keeper(
    state: Mapping[str, Tensor] | list[Piece], folder: Path | str, seed: int = 0, run: str = "", **training: Any
) -> Checkpoints:
    """Checkpoints over given tensors or pieces; of a certain run, where one is named."""
    pieces = state if isinstance(state, list) else [whole(name, value) for name, value in state.items()]
    made_by = {"recipe": "tiny", **({SUBMITTED: run} if run else {})}
    return Checkpoints(Fixed(pieces, **training), folder, CPU, seed=seed, made_by=made_by)


def save(folder: Path | str, step: int, seed: int = 0, run: str = "", **training: Any) -> None:
    """One blocking save of `tensors(seed)`."""
    keeper(tensors(seed), folder, run=run, **training).save(Kept({"window": torch.arange(3)}), step, final=True)


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
