"""Checkpoints that are committed: written beside, synced, manifest last, renamed; only then an old one goes.

    checkpoints/STAGE/step-00000250/
      model.safetensors       parameters and buffers, codebooks with counts and sums among them
      optimizer.safetensors   the optimizers' tensors
      extra.safetensors       what the task keeps besides, where it keeps something
      state.json              step
      manifest.json           size and sha256 of each file above; its presence is the commit

Nothing here is a pickle, so loading runs no code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqscale.errors import UserError
from vqscale.files import read_json, write_json
from vqscale.training.pieces import EXTRA, MODEL, OPTIMIZER, Piece, fill

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

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Write it into a training's pieces.

        Raises:
            UserError: it belongs to another network or other settings.
        """
        files = {MODEL: self.model(), OPTIMIZER: load_file(self.path / "optimizer.safetensors"), EXTRA: self.extra()}
        tensors = {f"{part}/{name}": value for part, file in files.items() for name, value in file.items()}
        pieces = list(pieces)
        unknown = sorted({f"{MODEL}/{name}" for name in files[MODEL]} - {piece.name for piece in pieces})
        if unknown:
            raise _misfit(self, f"{unknown[0]} is not in it")
        try:
            fill(pieces, tensors)
        except ValueError as fault:
            raise _misfit(self, str(fault)) from None


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    keep: int,
    extra: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Commit a checkpoint, then remove all but the newest `keep`. Called on rank 0 alone.

    `tensors` are full ones by the names of their pieces; `extra` is what the task keeps besides, by name.
    """
    parts: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}, EXTRA: dict(extra or {})}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    final = folder / _name(step)
    for unfinished in folder.glob(".step-*"):  # of saves that were killed
        shutil.rmtree(unfinished)
    beside = folder / f".{final.name}.{os.getpid()}"
    beside.mkdir(parents=True)
    save_file(_contiguous(parts[MODEL]), beside / "model.safetensors")
    save_file(_contiguous(parts[OPTIMIZER]), beside / "optimizer.safetensors")
    if parts[EXTRA]:
        save_file(_contiguous(parts[EXTRA]), beside / _EXTRA)
    write_json(beside / "state.json", {"step": step})
    names = [*_FILES, *([_EXTRA] if parts[EXTRA] else [])]
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


def load_into(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Load weights strictly: every name must match.

    Raises:
        UserError: the checkpoint belongs to another architecture.
    """
    try:
        model.load_state_dict(checkpoint.model(), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise _misfit(checkpoint, reason) from None


def _misfit(checkpoint: Checkpoint, reason: str) -> UserError:
    return UserError(
        f"does not fit the recipe's network ({reason})",
        where=str(checkpoint.path),
        mend="resume with the settings it was trained with",
    )
