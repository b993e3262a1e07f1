"""Finds the logs of a run's ranks in the elastic agent's tree, merges and follows them.

stages/STAGE/attempt-NNN/agent.log
stages/STAGE/attempt-NNN/ranks/RDZV_XXXX/attempt_K/N/{stdout,stderr}.log     K: restarts by the agent

Each node's agent has an RDZV_XXXX of its own, and N counts its processes; the file `rank` in N, which the process
leaves, has the rank in the whole job. Each task of an array has such a tree in stages/STAGE/task-NNN. Lines are merged
by the times before them (`vqscale.stamps`), so by the clocks of the hosts.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from launcher.state import RunState, StageState
from launcher.state_words import ENDED
from launcher.status import read_status
from vqscale import stamps
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json

_POLL_S = 0.3
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Who:
    """Whose lines they are."""

    name: str
    """`rank 0`, `agent`, `supervisor`, or `node a process 0` while the rank is not known."""
    stage: str | None = None
    attempt: int | None = None
    task: int | None = None
    rank: int | None = None

    @property
    def mark(self) -> str:
        """Stands before each line: `[tokenizer#2 rank 0]`, or `[extract.3#2 rank 0]` where it is task 3 of an array."""
        task = "" if self.task is None else f".{self.task}"
        return f"[{self.stage}{task}#{self.attempt} {self.name}]" if self.stage else f"[{self.name}]"


@dataclass(frozen=True)
class Line:
    """A line of a log."""

    who: Who
    time: str
    """Its stamp; empty where it has none."""
    text: str

    def plain(self) -> str:
        """As people read it."""
        return " ".join(filter(None, (self.who.mark, self.time, self.text)))

    def facts(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {"time": self.time or None, **asdict(self.who), "text": self.text}


@dataclass
class LogFile:
    """One file, and how far it has been read."""

    path: Path
    who: Who
    offset: int = 0
    part: bytes = field(default=b"", repr=False)
    when: str = ""
    """Stamp of the last line that had one."""

    def new_lines(self, whole: bool) -> Iterator[tuple[str, Line]]:
        """Lines that have come since the last call, each with the stamp that it is of.

        Args:
            whole: also give a last line that has no newline (the writer has ended).
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                while chunk := file.read(_CHUNK):
                    self.offset += len(chunk)
                    *lines, self.part = (self.part + chunk).split(b"\n")
                    yield from (self._line(line) for line in lines)
        except FileNotFoundError:
            return
        if whole and self.part:
            yield self._line(self.part)
            self.part = b""

    def _line(self, line: bytes) -> tuple[str, Line]:
        # A carriage return would let one rank's line overwrite the mark of another.
        when, text = stamps.split(line.decode(errors="replace"))
        text = text.rstrip("\r").rpartition("\r")[2]
        self.when = when or self.when
        return self.when, Line(self.who, when, text)


@dataclass(frozen=True)
class LogChoice:
    """Which logs the user wants."""

    stage: str | None = None
    """None: the stage that runs or stopped the run."""
    rank: int | None = None
    failed: bool = False
    attempt: int | None = None
    """None: the newest."""
    task: int | None = None
    """Of a stage that is an array; None: all of them."""


def print_logs(layout: RunLayout, choice: LogChoice, follow: bool, say: Callable[[Line], None]) -> None:
    """Print logs; with `follow`, go on until the run (or the chosen stage) is over.

    Raises:
        UserError: no such stage, rank or attempt.
    """
    known: dict[Path, LogFile] = {}
    while True:
        over = not follow or _over(layout, choice)  # asked before reading, so that the last lines are not missed
        stage = choice.stage or RunState.read(layout).current
        if stage is None and choice.attempt is not None and not follow:
            raise UserError("no stage has begun", where=layout.root.name, mend="leave --attempt out")
        if stage and not (follow and not _places(layout, choice, stage)):
            files = choose(layout, choice, stage)
        else:
            files = _before_first(layout)
        for file in files:
            known.setdefault(file.path, file).who = file.who  # its rank may be known only now
        # All files so far: the last lines of a stage may come after the next one has begun.
        for line in merged(known.values(), whole=over):
            say(line)
        if over:
            return
        time.sleep(_POLL_S)


def merged(files: Iterable[LogFile], whole: bool) -> Iterator[Line]:
    """New lines of several files by the times before them; of equal times, those of one file stay together."""
    return (line for _, line in heapq.merge(*(file.new_lines(whole) for file in files), key=itemgetter(0)))


@dataclass(frozen=True)
class Place:
    """The logs of one attempt, of a stage or of one task of it."""

    layout: RunLayout
    stage: str
    attempt: int

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.layout.attempt(self.stage, self.attempt)

    def of(self, name: str, rank: int | None = None) -> Who:
        """Whose lines they are that somebody has written here."""
        return Who(name, self.stage, self.attempt, self.layout.task, rank)


def choose(layout: RunLayout, choice: LogChoice, stage: str) -> list[LogFile]:
    """The files that a choice names, in the order of tasks and ranks."""
    places = _places(layout, choice, stage)
    if not places:
        raise UserError(f"stage '{stage}' has no such attempt", where=layout.root.name, mend=_begun(layout))
    if choice.failed:
        places = [place for place in places if not place.layout.done(stage).exists()]
        if not places:
            raise UserError(f"no rank of stage '{stage}' failed", where="--failed", mend="choose one with --stage")
    return [file for place in places for file in _chosen(place, choice)]


def _chosen(place: Place, choice: LogChoice) -> list[LogFile]:
    logs = rank_logs(place.folder)
    if choice.failed:
        logs = _of_failed(place, logs)
    if choice.rank is not None:
        logs = _of_rank(choice.rank, logs, place.stage)
    files = [LogFile(log.path, place.of(log.who, log.rank)) for log in logs]
    # The agent speaks when no rank did: it could not start them, or they died at their first line.
    silent = choice.rank is None and not any(file.path.stat().st_size for file in files)
    return [LogFile(place.folder / "agent.log", place.of("agent"))] if silent else files


def _places(layout: RunLayout, choice: LogChoice, stage: str) -> list[Place]:
    """The attempts that have begun: the newest of the stage, or of each of its tasks, or the one that is asked for."""
    state = RunState.read(layout)
    if stage not in state.stages:
        raise UserError(f"no stage '{stage}' in this run", where="--stage", mend=f"stages: {', '.join(state.stages)}")
    tasks = state.stages[stage].tasks
    if choice.task is not None and (tasks == 1 or choice.task not in range(tasks)):
        mend = f"tasks: 0 to {tasks - 1}" if tasks > 1 else "it is not in tasks: leave --task out"
        raise UserError(f"stage '{stage}' has no task {choice.task}", where="--task", mend=mend)
    wanted = range(tasks) if choice.task is None else (choice.task,)
    owns = [layout] if tasks == 1 else [layout.of_task(task) for task in wanted]
    entries = (RunState.read(own).stages.get(stage, StageState()) for own in owns)
    places = [
        Place(own, stage, one.attempt if choice.attempt is None else choice.attempt)
        for own, one in zip(owns, entries, strict=True)
    ]
    return [place for place in places if place.folder.is_dir()]


def last_words(attempt: Path) -> str:
    """The last line on standard error of the first rank that wrote one; else the agent's; else nothing."""
    errors = [LogFile(log.path, Who(log.who)) for log in rank_logs(attempt) if log.path.name == "stderr.log"]
    for file in [*errors, LogFile(attempt / "agent.log", Who("agent"))]:
        lines = [text for _, line in file.new_lines(whole=True) if (text := line.text.strip())]
        if lines:
            return lines[-1]
    return ""


@dataclass(frozen=True)
class RankLog:
    """One file of a rank."""

    path: Path
    rank: int | None
    """None while its process, on one of several nodes, has not said which it is."""
    restart: int
    """How often the agent had started its processes anew."""

    @property
    def who(self) -> str:
        """Whose it is, for the mark."""
        node = self.path.parents[2].name.rpartition("_")[2]
        return f"rank {self.rank}" if self.rank is not None else f"node {node} process {self.path.parent.name}"

    @property
    def failed(self) -> bool:
        """Whether its process left an error."""
        return self.path.with_name("error.json").exists()


def rank_logs(attempt: Path) -> list[RankLog]:
    """Logs of an attempt in the order of ranks; those of restarts by the agent follow."""
    paths = [path for path in attempt.glob("ranks/*/attempt_*/*/std*.log") if path.parent.name.isdigit()]
    alone = len({path.parents[2] for path in paths}) < 2
    found = [RankLog(p, _rank_of(p.parent, alone), int(p.parents[1].name.partition("_")[2])) for p in paths]
    last = 1 + max((log.rank for log in found if log.rank is not None), default=0)
    return sorted(found, key=lambda log: (last if log.rank is None else log.rank, log.restart, log.path))


def _rank_of(folder: Path, alone: bool) -> int | None:
    """By the note that the process left; by the folder, where all of them are on one node."""
    note = folder / "rank"
    return int(note.read_text()) if note.exists() else int(folder.name) if alone else None


def _of_rank(rank: int, logs: list[RankLog], stage: str) -> list[RankLog]:
    known = sorted({log.rank for log in logs if log.rank is not None})
    if known and rank not in known and all(log.rank is not None for log in logs):
        raise UserError(
            f"stage '{stage}' has no rank {rank}", where="--rank", mend=f"ranks: {', '.join(map(str, known))}"
        )
    return [log for log in logs if log.rank == rank]


def _of_failed(place: Place, logs: list[RankLog]) -> list[RankLog]:
    """Ranks that left an error or that the failure marker names; all of them when nobody knows."""
    told = (read_json(place.layout.failure(place.stage)) or {}).get("rank")
    failed = {log.rank for log in logs if log.failed} | {log.rank for log in logs if log.rank == told}
    return [log for log in logs if log.rank in failed] or logs


def _begun(layout: RunLayout) -> str:
    begun = [f"{name} (1 to {s.attempt})" for name, s in RunState.read(layout).stages.items() if s.attempt]
    return f"attempts so far: {', '.join(begun) or 'none'}"


def _before_first(layout: RunLayout) -> list[LogFile]:
    """Nothing has started: what the supervisor said, if anything."""
    return [LogFile(layout.log, Who("supervisor"))]


def _over(layout: RunLayout, choice: LogChoice) -> bool:
    status = read_status(layout, depth="none")
    states = {stage.stage: stage.state for stage in status.stages}
    # A stage that was preempted goes on by itself as long as somebody runs it.
    ended = set(ENDED) - {"preempted"}
    return status.over or (choice.stage is not None and states.get(choice.stage) in ended)
