"""The checkpoints of a stage in one folder, local or by URL: which there are, which are whole, which may go."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vqscale import storage
from vqscale.checkpoint import header
from vqscale.checkpoint.manifest import (
    LARGEST,
    MANIFEST,
    STATE,
    SUBMITTED,
    FaultError,
    Manifest,
    parse,
    parse_state,
)
from vqscale.errors import UserError

_STEP = re.compile(r"^step-(\d{8,12})$")
_BLOCK = 64 << 20  # bytes of a remote file that are hashed at once


@dataclass(frozen=True)
class Stored:
    """One committed checkpoint."""

    url: str
    """Its own folder."""
    manifest: Manifest

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.manifest.step


def step_name(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_url(where: str | Path, step: int) -> str:
    """A checkpoint's folder."""
    return storage.join(where, step_name(step))


def steps(where: str | Path) -> list[int]:
    """Steps of all folders that are called like checkpoints, the newest first; whole or not.

    Raises:
        UserError: the storage cannot be reached. So nothing is taken for absent that is only out of reach.
    """
    found = [_STEP.match(name) for name in storage.list_names(where) or []]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def open_stored(where: str | Path, step: int) -> Stored:
    """A checkpoint by its manifest; its files are not looked at.

    Raises:
        FaultError: it has no valid manifest.
        UserError: the storage cannot be reached.
    """
    url = step_url(where, step)
    place = storage.join(url, MANIFEST)
    size = storage.size(place)
    if size is None:
        raise FaultError(f"was never committed (no {MANIFEST})")
    if size > LARGEST:
        raise FaultError(f"{MANIFEST} has {size} bytes")
    manifest = parse(storage.read_bytes(place))
    if manifest.step != step:
        raise FaultError(f"{MANIFEST} is that of step {manifest.step}")
    return Stored(url, manifest)


def file_fault(stored: Stored, name: str) -> str | None:
    """What is wrong with one file of a checkpoint; None when nothing is. Reads all of it.

    Raises:
        UserError: the storage cannot be reached.
    """
    record, place = stored.manifest.files[name], storage.join(stored.url, name)
    size = storage.size(place)
    if size is None:
        return f"{name} is missing"
    if size != record.bytes:
        return f"{name} has {size} bytes, the manifest says {record.bytes}"
    try:
        if _sha256(place, size) != record.sha256:
            return f"{name} is not what the manifest says (its sha256 differs)"
        if name == STATE:
            parse_state(storage.read_bytes(place))
        else:
            read_places(stored, name)
    except FaultError as fault:
        return f"{name}: {fault}" if name != STATE else str(fault)
    except OSError as error:  # a bad sector
        return f"{name} cannot be read ({error.strerror})"
    return None


def read_places(stored: Stored, name: str) -> dict[str, header.Place]:
    """Where the parts lie in one of the files, from its head.

    Raises:
        FaultError: the head is broken or differs from the manifest.
        UserError: the file cannot be read.
    """
    record, place = stored.manifest.files[name], storage.join(stored.url, name)
    first = bytes(storage.read_range(place, 0, min(8, record.bytes))[:])
    head = bytes(storage.read_range(place, 0, header.head_length(first, record.bytes))[:])
    places = header.parse(head, record.bytes)
    if {key: (found.dtype, found.length) for key, found in places.items()} != stored.manifest.parts_in(name):
        raise FaultError("it holds other tensors than the manifest says")
    return places


def open_valid(where: str | Path, step: int) -> Stored:
    """A checkpoint all of whose files are as its manifest says. Reads all of it.

    Raises:
        FaultError: they are not.
        UserError: the storage cannot be reached.
    """
    stored = open_stored(where, step)
    for name in stored.manifest.files:
        fault = file_fault(stored, name)
        if fault:
            raise FaultError(fault)
    return stored


def find_fault(where: str | Path, step: int) -> str | None:
    """What is wrong with a checkpoint, None when nothing is. Reads all of it.

    Raises:
        UserError: the storage cannot be reached.
    """
    try:
        open_valid(where, step)
    except FaultError as fault:
        return str(fault)
    return None


def passed_over(where: str | Path, step: int, fault: str) -> str:
    """The line about a damaged checkpoint."""
    return f"{storage.shown(step_url(where, step))}: {fault}; passed over"


def newest(where: str | Path) -> tuple[Stored | None, list[str]]:
    """The newest checkpoint whose files are as its manifest says, and a line for each one passed over.

    Raises:
        UserError: the storage cannot be reached.
    """
    notes: list[str] = []
    for step in steps(where):
        try:
            return open_valid(where, step), notes
        except FaultError as fault:
            notes.append(passed_over(where, step, str(fault)))
    return None, notes


def require(where: str | Path, stage: str) -> Stored:
    """The newest valid checkpoint of a finished stage.

    Raises:
        UserError: there is none.
    """
    found, notes = newest(where)
    if found is None:
        reason = "; ".join(notes) or "no checkpoint"
        raise UserError(reason, where=str(where), mend=f"run the stage '{stage}' first")
    return found


def _is_foreign(where: str | Path, step: int, made_by: Mapping[str, str]) -> bool:
    try:
        return is_foreign(open_stored(where, step).manifest, made_by)
    except FaultError:
        return False


def remove(where: str | Path, step: int) -> None:
    """Remove a checkpoint; its manifest goes first, so that a removal that is cut off leaves no checkpoint.

    Raises:
        UserError: it cannot be removed.
    """
    url = step_url(where, step)
    storage.remove(storage.join(url, MANIFEST))
    storage.remove_folder(url)


def is_foreign(manifest: Manifest, made_by: Mapping[str, str]) -> bool:
    """Whether another run wrote a checkpoint; one that does not say is nobody else's."""
    mine = made_by.get(SUBMITTED)
    return mine is not None and manifest.made_by.get(SUBMITTED, mine) != mine


def retire(where: str | Path, step: int, keep: int, made_by: Mapping[str, str]) -> list[int]:
    """Remove all but the newest `keep` up to `step`, which has just been committed; returns the steps that went.

    Later ones go too: they were damaged, or the run would not have been resumed before them. Those of another run are
    left to it.
    """
    found = [one for one in steps(where) if not _is_foreign(where, one, made_by)]
    kept = [one for one in found if one <= step][:keep]
    gone = [one for one in found if one not in kept]
    for one in gone:
        remove(where, one)
    return gone


@dataclass(frozen=True)
class Pruning:
    """What `prune` would do."""

    kept: list[int]
    """Steps of the newest valid ones, the newest first."""
    removed: list[int]
    """Steps before the newest valid one that are not kept."""
    faults: dict[int, str]
    """Step → what is wrong with it, as far as was looked."""


def plan_pruning(where: str | Path, keep: int) -> Pruning:
    """Which checkpoints to keep: the newest `keep` that are valid. What is newer than those is left alone.

    Raises:
        UserError: the storage cannot be reached.
    """
    kept: list[int] = []
    faults: dict[int, str] = {}
    found = steps(where)
    for step in found:
        if len(kept) == keep:
            break
        fault = find_fault(where, step)
        if fault is None:
            kept.append(step)
        else:
            faults[step] = fault
    removed = [step for step in found if kept and step < kept[0] and step not in kept]
    return Pruning(kept, removed, faults)


def unfinished(where: str | Path) -> Iterator[Path]:
    """Folders of saves that never ended; local storage only."""
    path = storage.local_path(where)
    if path is not None:
        yield from path.glob(".step-*")


def _sha256(url: str, size: int) -> str:
    path = storage.local_path(url)
    if path is not None:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for start in range(0, size, _BLOCK):
        digest.update(storage.read_range(url, start, min(size, start + _BLOCK)))
    return digest.hexdigest()
