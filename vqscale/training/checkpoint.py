"""Checkpoints that are committed: written beside, synced, manifest last, renamed; only then an old one goes.

    checkpoints/STAGE/step-00000250/
      model.safetensors       parameters and buffers, codebooks with counts and sums among them
      optimizer.safetensors   the optimizers' tensors
      extra.safetensors       what the task keeps besides, where it keeps something
      state.json              step and the optimizers' plain values
      manifest.json           size and sha256 of each file above; its presence is the commit

Nothing here is a pickle, so loading runs no code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqscale.errors import UserError
from vqscale.files import read_json, write_json

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
_EXTRA = "extra.safetensors"
_FORMAT = "vqscale-checkpoint/0"


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint."""

    path: Path
    step: int
    """Finished optimizer steps."""

    def model(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return load_file(self.path / "model.safetensors")

    def fingerprint(self) -> str:
        """sha256 of the weights' file: what code shards carry to name their tokenizer."""
        return read_json(self.path / "manifest.json")["files"]["model.safetensors"]["sha256"]

    def extra(self) -> dict[str, Tensor]:
        """What the task kept besides, by name; empty when it kept nothing."""
        file = self.path / _EXTRA
        return load_file(file) if file.exists() else {}

    def optimizers(self) -> dict[str, dict[str, Any]]:
        """State of each optimizer by name, as `torch.optim.Optimizer.load_state_dict` takes it."""
        groups = read_json(self.path / "state.json")["param_groups"]
        states: dict[str, dict[str, Any]] = {
            name: {"state": {}, "param_groups": value} for name, value in groups.items()
        }
        for entry, tensor in load_file(self.path / "optimizer.safetensors").items():
            name, index, key = entry.split(".", 2)
            states[name]["state"].setdefault(int(index), {})[key] = tensor
        return states


def save(
    folder: Path,
    step: int,
    model: dict[str, Tensor],
    optimizers: Mapping[str, dict[str, Any]],
    keep: int,
    extra: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Commit a checkpoint, then remove all but the newest `keep`. Called on rank 0 alone.

    `extra` is what the task keeps besides, by name.
    """
    final = folder / _name(step)
    for unfinished in folder.glob(".step-*"):  # of saves that were killed
        shutil.rmtree(unfinished)
    beside = folder / f".{final.name}.{os.getpid()}"
    beside.mkdir(parents=True)
    save_file(_contiguous(model), beside / "model.safetensors")
    tensors = {
        f"{name}.{index}.{key}": value
        for name, optimizer in optimizers.items()
        for index, entry in optimizer["state"].items()
        for key, value in entry.items()
    }
    save_file(_contiguous(tensors), beside / "optimizer.safetensors")
    if extra:
        save_file(_contiguous(dict(extra)), beside / _EXTRA)
    groups = {name: optimizer["param_groups"] for name, optimizer in optimizers.items()}
    write_json(beside / "state.json", {"step": step, "param_groups": groups})
    names = [*_FILES, *([_EXTRA] if extra else [])]
    files = {name: {"bytes": (beside / name).stat().st_size, "sha256": _sha256(beside / name)} for name in names}
    for name in names:
        _sync(beside / name)
    write_json(beside / "manifest.json", {"format": _FORMAT, "step": step, "files": files})
    _sync(beside)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    _sync(folder)
    _retire(folder, step, keep)
    return Checkpoint(final, step)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are as its manifest says, and a line for each one passed over."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return Checkpoint(path, int(path.name.removeprefix("step-"))), passed_over
        passed_over.append(f"{path}: {fault}; passed over")
    return None, passed_over


def require(folder: Path, stage: str) -> Checkpoint:
    """The newest valid checkpoint of a finished stage.

    Raises:
        UserError: there is none.
    """
    found, passed_over = newest(folder)
    if found is None:
        reason = "; ".join(passed_over) or "no checkpoint"
        raise UserError(reason, where=str(folder), mend=f"run the stage '{stage}' first")
    return found


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, None when nothing is."""
    try:
        manifest = read_json(path / "manifest.json")
    except ValueError:  # no JSON, or no text at all
        return "manifest.json is not JSON"
    if manifest is None:
        return "was never committed (no manifest.json)"
    try:
        if (manifest["format"], _name(manifest["step"])) != (_FORMAT, path.name):
            return f"manifest.json is that of {manifest['format']} step {manifest['step']}"
        names = {*_FILES, *manifest["files"]}
        expected = {name: (manifest["files"][name]["bytes"], manifest["files"][name]["sha256"]) for name in names}
    except (KeyError, TypeError, ValueError):
        return "manifest.json lacks what a manifest has"
    for name, (size, sha256) in expected.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size or _sha256(file) != sha256:
            return f"{name} is not what its manifest says"
    return None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _retire(folder: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` up to `step`. Later ones were damaged: the run was resumed before them."""
    own = _name(step)
    found = sorted(path for path in folder.glob("step-*"))
    kept = [path for path in found if path.name <= own][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # channels_last kernels are not contiguous, and safetensors stores contiguous tensors only.
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load one optimizer's state (an entry of `Checkpoint.optimizers`) into the memory layout of its parameters.

    Fused AdamW on the CPU walks parameter, gradient and moments by address: moments that are stored contiguously
    would belong to other weights of a channels_last kernel.
    """
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)  # settings are the recipe's, not the checkpoint's
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_into(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Load weights strictly: every name must match.

    Raises:
        UserError: the checkpoint belongs to another architecture.
    """
    try:
        model.load_state_dict(checkpoint.model(), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"does not fit the recipe's network ({reason})",
            where=str(checkpoint.path),
            mend="resume with the settings it was trained with",
        ) from None
