"""Benchmark `checkpoint`: how long a training waits for a save, in the background and blocking, against plain writing.

A transformer of about 60 million parameters with AdamW's moments is saved by one rank to a local disk, synced. The
save in the background is timed up to where training would go on; it is then waited for outside of the lap. What was
saved is compared with what was there when the save began, although it is changed right behind it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.harness import Bench
from benchmarks.machine import threads
from benchmarks.result import at_least, at_most
from benchmarks.timing import Contender, Race
from vqscale.checkpoint.folder import open_valid
from vqscale.config.training import Training
from vqscale.models.network import GridShape
from vqscale.models.transformer import Transformer
from vqscale.training.checkpoints.keeper import Checkpoints
from vqscale.training.checkpoints.reader import Checkpoint
from vqscale.training.pieces import Piece, whole

GOALS = {
    "async_stall_fraction": at_most(0.10),
    "blocking_fraction_of_floor": at_least(0.70),
    "blocking_vs_torch_dcp": at_least(1.0),
}
PACKAGES = ("safetensors",)

THREADS = 2
_SECONDS, _RATE = "s", "MB/s"


class Trained:
    """A network and its optimizer, as an engine and a task of `Checkpoints`.

    Args:
        layers: of the transformer.
        width: of its layers.
    """

    strategy = "ddp"

    def __init__(self, layers: int, width: int) -> None:
        torch.manual_seed(0)
        self._model = Transformer([GridShape(8, 512), GridShape(16, 512)], 10, layers=layers, width=width, heads=8)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3, fused=True)
        for parameter in self._model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.training = Training(steps=10**6, global_batch=1, learning_rate=1.0, keep=1)

    def pieces(self) -> list[Piece]:
        """Weights, buffers and moments, whole."""
        return [whole(name, value) for name, value in self.tensors().items()]

    def tensors(self) -> dict[str, Tensor]:
        """The same by name."""
        found = {f"model/{name}": value for name, value in self._model.state_dict().items()}
        for name, parameter in self._model.named_parameters():
            for key, value in self._optimizer.state[parameter].items():
                found[f"optimizer/adamw/{key}/{name}"] = value
        return found

    def change(self) -> None:
        """What the next step would do, only more of it."""
        with torch.no_grad():
            for value in self.tensors().values():
                value.add_(1)

    def extra_state(self) -> Mapping[str, Tensor]:
        """Nothing besides."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load."""

    def materialise_optimizer(self) -> None:
        """It is there."""

    def loaded(self) -> None:
        """Nothing follows from the pieces."""


class Saver:
    """Saves one state again and again, each time as a later step.

    Args:
        trained: what is saved.
        folder: where.
        asynchronous: whether in the background.
    """

    def __init__(self, trained: Trained, folder: Path, *, asynchronous: bool) -> None:
        self._trained, self.folder, self.step = trained, folder, 0
        training = trained.training.model_copy(update={"checkpoint_async": asynchronous})
        self.write_s: list[float] = []
        """Seconds from staging to the commit, of each save."""
        self._checkpoints = Checkpoints(_With(trained, training), folder, torch.device("cpu"), seed=0)

    def save(self) -> float:
        """One save, as far as training waits for it; returns the bytes."""
        self.step += 1
        self._checkpoints.save(self._trained, self.step, self)
        return _bytes(self._trained.tensors())

    def finish(self) -> None:
        """Wait for what is done in the background."""
        self._checkpoints.finish(self)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """As a journal: nothing is drawn."""

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """As a journal: keep how long writing took.

        Raises:
            RuntimeError: the save failed.
        """
        if not facts["committed"]:
            raise RuntimeError(facts["fault"])
        self.write_s.append(facts["write_s"])


class _With:
    """An engine with other settings."""

    def __init__(self, trained: Trained, training: Training) -> None:
        self.training, self.strategy = training, trained.strategy
        self.pieces, self.loaded = trained.pieces, trained.loaded
        self.materialise_optimizer = trained.materialise_optimizer


def run(bench: Bench) -> None:
    """Check what is saved, then race the ways of saving it."""
    layers, width = (2, 64) if bench.quick else (18, 512)
    with one_rank(), threads(THREADS):
        trained = Trained(layers, width)
        size = _bytes(trained.tensors())
        bench.config |= {
            "parameters": sum(piece.local.numel() for piece in trained.pieces() if piece.name.startswith("model/")),
            "tensors": len(trained.pieces()),
            "bytes": size,
            "ranks": 1,
            "threads": THREADS,
            "filesystem": filesystem(bench.folder),
            "torch_dcp": "dcp.save with FileSystemWriter(single_file_per_rank=True, sync_files=True), blocking",
        }
        blocking = Saver(trained, bench.folder / "blocking", asynchronous=False)
        background = Saver(trained, bench.folder / "async", asynchronous=True)
        for name, saver in {"blocking": blocking, "async": background}.items():
            check(bench, name, trained, saver)
        background.write_s.clear()
        race = bench.race(
            f"{size / 1e6:,.0f} MB",
            [
                Contender("blocking", blocking.save),
                Contender("async", background.save, after=background.finish),
                plain(trained, bench.folder / "plain"),
                copy(trained),
                torch_dcp(trained, bench.folder / "dcp"),
            ],
        )
        keep(bench, race, background)


def check(bench: Bench, name: str, trained: Trained, saver: Saver) -> None:
    """Save, change everything at once, and compare what was saved with what had been there."""
    before = {key: value.clone() for key, value in trained.tensors().items()}
    saver.save()
    trained.change()
    saver.finish()
    found = Checkpoint(open_valid(saver.folder, saver.step)).tensors()
    wrong = sum(not torch.equal(found.get(key, torch.empty(0)), value) for key, value in before.items())
    bench.check(name, "tensors that differ from those there were when the save began", wrong, 0)


def plain(trained: Trained, path: Path) -> Contender:
    """One file of the same bytes, written and synced, without a copy, a hash or a manifest."""
    data = torch.cat([value.reshape(-1).view(torch.uint8) for value in _flat(trained)]).numpy().data

    def work() -> float:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(data), 32 << 20):
                file.write(data[start : start + (32 << 20)])
            os.fsync(file.fileno())
        return len(data)

    return Contender("plain", work, after=path.unlink)


def copy(trained: Trained) -> Contender:
    """Torch's copy of the same tensors into memory that has been used before."""
    sources = _flat(trained)
    targets = [value.clone() for value in sources]

    def work() -> float:
        torch._foreach_copy_(targets, sources)
        return _bytes(dict(enumerate(sources)))

    return Contender("copy", work)


def torch_dcp(trained: Trained, path: Path) -> Contender:
    """Torch's own file system writer."""

    def work() -> float:
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True)
        dcp.save(dict(trained.tensors()), storage_writer=writer)
        return _bytes(trained.tensors())

    return Contender("torch_dcp", work, after=lambda: shutil.rmtree(path))


def keep(bench: Bench, race: Race, background: Saver) -> None:
    """Figures, floors and ratios."""
    bench.figure("stall_s", race.seconds("async"), _SECONDS)
    bench.figure("blocking_s", race.seconds("blocking"), _SECONDS)
    bench.figure("async_write_s", background.write_s[-len(race.seconds("async")) :], _SECONDS)
    bench.figure("torch_dcp_s", race.seconds("torch_dcp"), _SECONDS)
    bench.figure("blocking_rate", [rate / 1e6 for rate in race.rates("blocking")], _RATE)
    bench.floor("plain_s", race.seconds("plain"), _SECONDS, "the same bytes in one file, written and synced")
    bench.floor("copy_s", race.seconds("copy"), _SECONDS, "the same tensors copied into memory that was used before")
    bench.ratio("async_stall_fraction", race.seconds("async"), race.seconds("blocking"))
    bench.ratio("blocking_fraction_of_floor", race.seconds("plain"), race.seconds("blocking"))
    bench.ratio("blocking_vs_torch_dcp", race.seconds("torch_dcp"), race.seconds("blocking"))


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def filesystem(path: Path) -> str:
    """Kind of the file system that a path lies on; in memory nothing is written to a disk."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    fitting = [(place, kind) for place, kind in mounts if path.resolve().is_relative_to(place)]
    return max(fitting, key=lambda mount: len(mount[0]))[1]


def _flat(trained: Trained) -> list[Tensor]:
    return [value.detach() for value in trained.tensors().values()]


def _bytes(tensors: Mapping[Any, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())
