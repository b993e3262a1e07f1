"""Whether a stage that ended before its time is started again: by the class of its failure, within limits.

| class | seen by | goes on |
|---|---|---|
| user | `failure.json` says so: a fault that the user has to mend | never |
| diverged | the training did, again after it was rolled back | never |
| preempted | the stage saved, or was asked to | while it gets on, at most `requeues` times |
| node | a node of the job does not answer, or a GPU failed | elsewhere, after a pause, `retries` times in a row |
| hang | the watchdog's note, with the node of the rank that hangs | elsewhere, as above |
| network | ranks lost each other, all nodes answer | after a pause, as above |
| unknown | anything else: an exception, a process that was killed | after a pause, once in a row |

"In a row" counts failures since the last progress: a newer checkpoint, or more shards.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.state import StageState
from vqscale.config.layout import RunLayout
from vqscale.events import newest
from vqscale.files import read_json, write_json
from vqscale.stages import TRAINED

NEVER = ("user", "diverged")
"""Classes that come again wherever the stage is started."""
_UNKNOWN = 1
_LONGEST_PAUSE_S = 900


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended before its time."""

    kind: str
    """Its class."""
    message: str
    """The same in a line."""
    suspects: tuple[str, ...] = ()
    """Nodes that seem to be at fault."""


@dataclass(frozen=True)
class Try:
    """An attempt that ended before its time, and was followed by another one."""

    attempt: int
    kind: str
    step: int | None
    """What it had got done by then; None where nothing was saved."""
    message: str
    excluded: tuple[str, ...] = ()
    """Nodes that were left out from then on, because of it."""
    pause_s: int = 0
    time: float = 0.0

    @property
    def words(self) -> str:
        """How the next one differs: `, without node3, after 30 s`."""
        without = f", without {', '.join(self.excluded)}" if self.excluded else ""
        return without + (f", after {self.pause_s} s" if self.pause_s else "")


@dataclass(frozen=True)
class Limits:
    """How often a stage may be started again."""

    requeues: int
    """In all."""
    retries: int
    """After failures in a row."""
    pause_s: int
    """First pause after a failure; each further one in a row takes twice as long."""


@dataclass(frozen=True)
class Judgement:
    """What is to become of an attempt that ended before its time."""

    failure: Failure
    step: int | None
    """What it had got done."""
    refusal: str
    """Why the stage is not started again; empty when it is."""
    pause_s: int
    """Seconds before it is."""

    @property
    def words(self) -> str:
        """The failure with its class, where its words do not begin with that."""
        kind, message = self.failure.kind, self.failure.message
        return message if kind in (*NEVER, "preempted") else f"{kind}: {message}"


def judge(
    layout: RunLayout,
    stage: str,
    entry: StageState,
    down: Sequence[str],
    earlier: Sequence[Try],
    limits: Limits,
    how: str = "does not answer",
) -> Judgement:
    """Judge the newest attempt at a stage, by what it has left in the run directory.

    Args:
        layout: the run, or one task.
        stage: name of the stage.
        entry: how it stands: failed or preempted.
        down: nodes of the attempt that are lost.
        earlier: the times that it was started again before.
        limits: of the profile.
        how: what is the matter with the lost nodes.
    """
    failure = _failure(layout, stage, entry, down, how)
    step = _step(layout, stage, entry) if failure.kind == "preempted" else progress(layout, stage)
    wait = pause(failure.kind, in_a_row(step, earlier), limits)
    return Judgement(failure, step, refusal(failure.kind, step, earlier, limits), wait)


def _failure(layout: RunLayout, stage: str, entry: StageState, down: Sequence[str], how: str) -> Failure:
    """The class of the attempt's end. A stage that was asked to stop may have failed for good meanwhile."""
    found = read_json(layout.failure(stage))
    for_good = (found or {}).get("kind") in NEVER
    if entry.state == "preempted" and not for_good:
        return Failure("preempted", entry.message)
    message = str((found or {}).get("message", entry.message)) if entry.state == "preempted" else entry.message
    return classify(found, message, down, how)


def _step(layout: RunLayout, stage: str, entry: StageState) -> int | None:
    """The step that the attempt says it has saved when it was asked to stop."""
    marker = read_json(layout.preempted(stage))
    mine = marker is not None and marker["attempt"] == entry.attempt
    return int(marker["step"]) if mine else None


def classify(
    failure: Mapping[str, Any] | None, message: str, down: Sequence[str], how: str = "does not answer"
) -> Failure:
    """The class of a failed attempt.

    Args:
        failure: what the stage has left in `failure.json`; None when it could not.
        message: why it failed, as the supervisor says.
        down: nodes of the attempt that are lost, as the scheduler says.
        how: what is the matter with them.
    """
    kind, suspects = (failure or {}).get("kind", "error"), tuple((failure or {}).get("suspects", ()))
    if kind in NEVER:
        return Failure(kind, message)
    if kind == "hang":
        return Failure("hang", message, suspects)
    if kind == "device":
        return Failure("node", message, suspects)
    if down:
        return Failure("node", f"{', '.join(down)} {how}; {message}", tuple(down))
    return Failure("network" if kind == "network" else "unknown", message)


def refusal(kind: str, step: int | None, earlier: Sequence[Try], limits: Limits) -> str:
    """Why a stage may not go back into the queue; empty when it may.

    Args:
        kind: class of its failure.
        step: what it has got done; None when nothing was saved.
        earlier: the times that its job went back before.
        limits: of the profile.
    """
    if kind in NEVER:
        return "it would fail again"
    if len(earlier) >= limits.requeues:
        return f"the profile's limit of {limits.requeues} is reached"
    if kind == "preempted":
        before = [one.step for one in earlier if one.kind == kind]
        return "no progress since the last time" if before and _reached(step) <= _reached(before[-1]) else ""
    most = min(_UNKNOWN, limits.retries) if kind == "unknown" else limits.retries
    failed = in_a_row(step, earlier)
    return f"failed {failed + 1} times in a row without progress" if failed >= most else ""


def in_a_row(step: int | None, earlier: Sequence[Try]) -> int:
    """Failures at the end of `earlier` since which nothing was got done."""
    count = 0
    for one in reversed(earlier):
        if one.kind == "preempted" or _reached(one.step) < _reached(step):
            break
        count += 1
    return count


def pause(kind: str, failed: int, limits: Limits) -> int:
    """Seconds before the next start, after so many failures in a row besides this one."""
    return 0 if kind == "preempted" else min(_LONGEST_PAUSE_S, limits.pause_s * 2**failed)


def left_out(suspects: Collection[str], usable: Collection[str], before: Collection[str], needed: int) -> list[str]:
    """The suspects that can be left out while enough nodes are there without them.

    Args:
        suspects: nodes that seem to be at fault.
        usable: nodes of the partition that take jobs, or will.
        before: those left out already.
        needed: nodes that the stage takes.
    """
    fresh = [node for node in suspects if node not in before]
    rest = set(usable) - set(before) - set(fresh)
    return fresh if len(rest) >= needed else []


def progress(layout: RunLayout, stage: str) -> int | None:
    """What a stage has got done that a new start need not do again: its newest checkpoint, else its last event.

    By what the stage itself has told: the storage of the checkpoints may be what has failed.
    """
    kind = "checkpoint" if stage in TRAINED else ""
    event = newest(layout.events(stage), kind).get(kind)
    return int(event["step"]) if event else None


def read_tries(layout: RunLayout, stage: str, job: str) -> list[Try]:
    """The times that a stage was started again by its job, the oldest first; none where the record is another job's.

    Without a scheduler the job is the supervisor (`again.supervisor_name`).
    """
    record = read_json(layout.requeues(stage)) or {}
    if record.get("job") != job:
        return []
    return [Try(**{**one, "excluded": tuple(one["excluded"])}) for one in record["tries"]]


def write_tries(layout: RunLayout, stage: str, job: str, tries: Sequence[Try]) -> None:
    """Put them down, each with its time."""
    each = [{**asdict(one), "time": one.time or round(time.time(), 3)} for one in tries]
    write_json(layout.requeues(stage), {"job": job, "tries": each})


def _reached(step: int | None) -> int:
    return -1 if step is None else step
