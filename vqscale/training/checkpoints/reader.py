"""The way in: whole tensors for export, and DCP's reader for a training that goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from vqscale import storage
from vqscale.checkpoint import folder
from vqscale.checkpoint.folder import Stored
from vqscale.checkpoint.manifest import STATE, FaultError, Part, parse_state
from vqscale.errors import UserError
from vqscale.training.checkpoints.fitting import require_fit
from vqscale.training.checkpoints.held import DTYPES, Held, dtype_name
from vqscale.training.pieces import EXTRA, MODEL

AVERAGE = f"{EXTRA}/average."
"""The running average of the weights, where a task keeps one."""

_RUN = 128 << 20  # bytes that are read at once, where what is needed lies side by side


class Wanted(NamedTuple):
    """Elements of one part, and where they go."""

    part: Part
    name: str
    """Of the tensor."""
    first: int
    """First element, counted from the part's own."""
    target: Tensor
    """Flat, as long as what is wanted."""


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint, to be read without a process group."""

    stored: Stored

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.stored.step

    def tensors(self, prefix: str = "", *, but: Collection[str] = ()) -> dict[str, Tensor]:
        """Whole tensors on the CPU, of all whose names begin so; by the rest of their names.

        Args:
            prefix: such as `model/`.
            but: whole names of tensors that are left out.

        Raises:
            UserError: a file cannot be read, or is not what the manifest says.
        """
        found, wanted = {}, []
        for name, record in self.stored.manifest.tensors.items():
            if name.startswith(prefix) and name not in but:
                flat = torch.empty(record.elements, dtype=DTYPES[record.dtype])
                found[name.removeprefix(prefix)] = flat.view(record.shape)
                wanted += [Wanted(part, name, 0, flat[part.start : part.start + part.length]) for part in record.places]
        read_parts(self.stored, wanted)
        return found

    def state(self) -> dict[str, Any]:
        """The plain values: step, seed, data position, schedule.

        Raises:
            UserError: they cannot be read.
        """
        place = storage.join(self.stored.url, STATE)
        with _one_line(place):
            return parse_state(storage.read_bytes(place))

    def fingerprint(self) -> str:
        """Of the network's content: what code shards carry to name their tokenizer.

        The running average of the weights belongs to it where there is one, since that is what encodes. Ranks,
        strategy and files do not. Reads the network.
        """
        return content_hash(self.tensors(f"{MODEL}/"), self.tensors(AVERAGE))


def newest(where: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """As `folder.newest`."""
    found, notes = folder.newest(where)
    return Checkpoint(found) if found else None, notes


def require(where: str | Path, stage: str) -> Checkpoint:
    """As `folder.require`."""
    return Checkpoint(folder.require(where, stage))


def load_network(network: nn.Module, checkpoint: Checkpoint) -> str:
    """Give a network its weights and buffers, every name of which must match; returns the checkpoint's fingerprint.

    Raises:
        UserError: the checkpoint belongs to another architecture, or cannot be read.
    """
    entries = {f"{MODEL}/{name}": (tuple(t.shape), dtype_name(t)) for name, t in network.state_dict().items()}
    require_fit(checkpoint.stored, entries)
    weights = checkpoint.tensors(f"{MODEL}/")
    network.load_state_dict(weights)
    return content_hash(weights, checkpoint.tensors(AVERAGE))


def content_hash(*groups: Mapping[str, Tensor]) -> str:
    """sha256 over groups of tensors: names, shapes, dtypes and values in row-major order."""
    digest = hashlib.sha256()
    for tensors in groups:
        digest.update(b"%d tensors\n" % len(tensors))
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {dtype_name(tensor)} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_parts(stored: Stored, wanted: list[Wanted]) -> None:
    """Read ranges of parts to where they go; file by file, in the order in which they lie there.

    Raises:
        UserError: a file cannot be read, or is not what the manifest says.
    """
    by_file: dict[str, list[Wanted]] = {}
    for one in wanted:
        if one.part.length:
            by_file.setdefault(one.part.file, []).append(one)
    for file, needed in by_file.items():
        with _one_line(storage.join(stored.url, file)):
            _read_file(stored, file, needed)


def _read_file(stored: Stored, file: str, needed: list[Wanted]) -> None:
    places = folder.read_places(stored, file)

    def span(one: Wanted) -> tuple[int, int]:
        begin = places[one.part.key(one.name)].begin + one.first * one.target.element_size()
        return begin, begin + one.target.nbytes

    url = storage.join(stored.url, file)
    for run in _runs(sorted(needed, key=span), span):
        first, end = span(run[0])[0], max(span(one)[1] for one in run)
        data = storage.read_range(url, first, end)
        for one in run:
            begin = span(one)[0] - first
            flat = torch.frombuffer(data, dtype=one.target.dtype, count=one.target.numel(), offset=begin)
            one.target.copy_(flat)


def _runs(needed: list[Wanted], span: Callable[[Wanted], tuple[int, int]]) -> Iterator[list[Wanted]]:
    """What is read at once: neighbours, as many as fit into `_RUN`, or one alone that does not."""
    run: list[Wanted] = []
    for one in needed:
        if run and (span(one)[0] > span(run[-1])[1] or span(one)[1] - span(run[0])[0] > _RUN):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


@contextmanager
def _one_line(url: str) -> Iterator[None]:
    """Turns a fault of a file into the one line for the user."""
    try:
        yield
    except FaultError as fault:
        raise UserError(str(fault), where=url, mend="resume from another checkpoint") from None


class Reader(StorageReader):
    """Gives DCP the manifest for metadata, and ranges of the files."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """What is read is known already."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Chunks of flat tensors, from the manifest."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[record.dtype]),
                    torch.Size([record.elements]),
                    [ChunkStorageMetadata(torch.Size([p.start]), torch.Size([p.length])) for p in record.places],
                )
                for name, record in self._stored.manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank's plan asks for."""
        read_parts(self._stored, [self._wanted(item, planner) for item in plan.items])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _wanted(self, item: ReadItem, planner: LoadPlanner) -> Wanted:
        assert item.storage_index.offset is not None
        name, start = item.storage_index.fqn, item.storage_index.offset[0]
        part = next(p for p in self._stored.manifest.tensors[name].places if p.start == start and p.length)
        return Wanted(part, name, item.storage_offsets[0], planner.resolve_tensor(item))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP asks for it where it has to choose a reader itself; here it never has to."""
        return True


class HeldPlanner(DefaultLoadPlanner):
    """DCP's planner for `Held` in the place of tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Without DCP's search for tensors on the meta device, which knows no other kinds of values."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The flat target of a chunk."""
        held = self.state_dict[index.fqn]
        assert isinstance(held, Held)
        assert index.offset is not None
        return held.values(index.offset[0])
