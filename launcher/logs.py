"""Finds the logs of a run's ranks in the elastic agent's tree, merges and follows them.

stages/STAGE/attempt-NNN/agent.log
stages/STAGE/attempt-NNN/ranks/RDZV_XXXX/attempt_K/N/{stdout,stderr}.log     K: restarts by the agent

Each node's agent has an RDZV_XXXX of its own, and N counts its processes; the file `rank` in N, which the process
leaves, has the rank in the whole job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launcher.state import ENDED, RunState
from launcher.status import read_status
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json

_POLL_S = 0.3
_CHUNK = 1 << 20


@dataclass
class LogFile:
    """One file, and how far it has been read."""

    path: Path
    mark: str
    """Stands before each line: `[0]` for rank 0."""
    offset: int = 0
    part: bytes = field(default=b"", repr=False)

    def new_lines(self, whole: bool) -> Iterator[str]:
        """Lines that have come since the last call.

        Args:
            whole: also give a last line that has no newline (the writer has ended).
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                while chunk := file.read(_CHUNK):
                    self.offset += len(chunk)
                    *lines, self.part = (self.part + chunk).split(b"\n")
                    yield from (self._show(line) for line in lines)
        except FileNotFoundError:
            return
        if whole and self.part:
            yield self._show(self.part)
            self.part = b""

    def _show(self, line: bytes) -> str:
        # A carriage return would let one rank's line overwrite the mark of another.
        text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
        return f"{self.mark} {text}" if self.mark else text


@dataclass(frozen=True)
class LogChoice:
    """Which logs the user wants."""

    stage: str | None = None
    """None: the stage that runs or stopped the run."""
    rank: int | None = None
    failed: bool = False
    attempt: int | None = None
    """None: the newest."""


def print_logs(layout: RunLayout, choice: LogChoice, follow: bool, say: Callable[[str], None] = print) -> None:
    """Print logs; with `follow`, go on until the run (or the chosen stage) is over.

    Raises:
        UserError: no such stage, rank or attempt.
    """
    known: dict[Path, LogFile] = {}
    while True:
        over = not follow or _over(layout, choice)  # asked before reading, so that the last lines are not missed
        stage = choice.stage or RunState.read(layout).current
        if stage and not (follow and _awaited(layout, stage)):
            files = choose(layout, choice, stage)
        else:
            files = _before_first(layout)
        for file in files:
            known.setdefault(file.path, file)
        # All files so far: the last lines of a stage may come after the next one has begun.
        for file in known.values():
            for line in file.new_lines(whole=over):
                say(line)
        if over:
            return
        time.sleep(_POLL_S)


def choose(layout: RunLayout, choice: LogChoice, stage: str) -> list[LogFile]:
    """The files that a choice names, in the order of their ranks."""
    folder = layout.attempt(stage, choice.attempt or _newest_attempt(layout, stage))
    if not folder.is_dir():
        raise UserError(f"stage '{stage}' has no such attempt", where=layout.root.name, mend=_begun(layout))
    ranks = rank_files(folder)
    if choice.failed:
        return _of_failed(layout, stage, folder, ranks)
    if choice.rank is not None:
        if ranks and choice.rank not in ranks:
            there = ", ".join(map(str, ranks))
            raise UserError(f"stage '{stage}' has no rank {choice.rank}", where="--rank", mend=f"ranks: {there}")
        return ranks.get(choice.rank, [])
    files = [file for rank in ranks.values() for file in rank]
    # The agent speaks when no rank did: it could not start them, or they died at their first line.
    return files if _speak(files) else [LogFile(folder / "agent.log", "[agent]")]


def last_words(attempt: Path) -> str:
    """The last line on standard error of the first rank that wrote one; else the agent's; else nothing."""
    errors = [file for files in rank_files(attempt).values() for file in files if file.path.name == "stderr.log"]
    for file in [*errors, LogFile(attempt / "agent.log", "")]:
        lines = [line for line in file.new_lines(whole=True) if line.strip(f"{file.mark} ")]
        if lines:
            return lines[-1].removeprefix(file.mark).strip()
    return ""


def rank_files(attempt: Path) -> dict[int, list[LogFile]]:
    """Logs of an attempt by rank; those of restarts by the agent follow in order."""
    found: dict[int, list[LogFile]] = {}
    for path in sorted(attempt.glob("ranks/*/attempt_*/*/std*.log"), key=_restart_and_name):
        if path.parent.name.isdigit():
            rank = _rank_of(path.parent)
            found.setdefault(rank, []).append(LogFile(path, f"[{rank}]"))
    return dict(sorted(found.items()))


def _rank_of(folder: Path) -> int:
    """By the note that the process left; by the folder where it died before, as on one node."""
    note = folder / "rank"
    return int(note.read_text() if note.exists() else folder.name)


def _restart_and_name(path: Path) -> tuple[int, str]:
    return int(path.parents[1].name.partition("_")[2]), path.name


def _of_failed(layout: RunLayout, stage: str, folder: Path, ranks: dict[int, list[LogFile]]) -> list[LogFile]:
    """Ranks that left an error or that the failure marker names; all of them when nobody knows."""
    if layout.done(stage).exists():
        raise UserError(f"no rank of stage '{stage}' failed", where="--failed", mend="choose one with --stage")
    failed = {_rank_of(path.parent) for path in folder.glob("ranks/*/attempt_*/*/error.json")}
    marker = read_json(layout.failure(stage)) or {}
    failed |= {marker["rank"]} & set(ranks) if "rank" in marker else set()
    files = [file for rank in sorted(failed or ranks) for file in ranks.get(rank, [])]
    return files if _speak(files) else [LogFile(folder / "agent.log", "[agent]")]


def _speak(files: list[LogFile]) -> bool:
    return any(file.path.stat().st_size for file in files)


def _newest_attempt(layout: RunLayout, stage: str) -> int:
    state = RunState.read(layout)
    if stage not in state.stages:
        raise UserError(f"no stage '{stage}' in this run", where="--stage", mend=f"stages: {', '.join(state.stages)}")
    return state.stages[stage].attempt


def _begun(layout: RunLayout) -> str:
    begun = [f"{name} (1 to {s.attempt})" for name, s in RunState.read(layout).stages.items() if s.attempt]
    return f"attempts so far: {', '.join(begun) or 'none'}"


def _awaited(layout: RunLayout, stage: str) -> bool:
    return not layout.attempt(stage, _newest_attempt(layout, stage)).is_dir()


def _before_first(layout: RunLayout) -> list[LogFile]:
    """Nothing has started: what the supervisor said, if anything."""
    return [LogFile(layout.log, "[supervisor]")]


def _over(layout: RunLayout, choice: LogChoice) -> bool:
    status = read_status(layout)
    states = {stage.stage: stage.state for stage in status.stages}
    return status.over or (choice.stage is not None and states.get(choice.stage) in ENDED)
