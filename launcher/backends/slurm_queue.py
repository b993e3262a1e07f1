"""Questions to Slurm, by its own commands in formats that are asked for: their JSON changes from version to version."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqscale.errors import UserError

_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
_ANSWER_S = 30
_FRESH_S = 3.0
"""Age up to which an answer is used again: a display asks twice a second, and the controller serves a whole cluster."""

_answer: tuple[float, str, dict[str, Row] | UserError] | None = None
"""When the last answer came, from which cluster, and what it was; no answer is one too."""
_ASKING = threading.Lock()
"""Many runs are looked at in threads; the first of them asks for all."""


@dataclass(frozen=True)
class Row:
    """A job as the controller sees it."""

    state: str
    """Slurm's word, such as PENDING."""
    name: str
    """What it was called when it was submitted. Numbers come again, after years or on a cluster that is set up anew."""
    reason: str = ""
    """Why it waits."""
    place: str = ""
    """Folder in which it was submitted; of a stage's job, the run directory. Empty where it was not asked for."""

    @property
    def alive(self) -> bool:
        """Whether it will run, runs, or has processes that are ending."""
        return self.state not in _ENDED


def jobs(fresh: bool = False) -> dict[str, Row]:
    """All jobs of this user that the controller knows, by number, in one query; those that ended lately among them.

    An array is one job here: the first of its tasks that runs, else one that waits, else one that failed.

    Args:
        fresh: ask now, however short ago the last answer was.

    Raises:
        UserError: Slurm cannot be asked.
    """
    global _answer
    conf = os.environ.get("SLURM_CONF", "")
    with _ASKING:
        if fresh or _answer is None or _answer[1] != conf or time.monotonic() - _answer[0] > _FRESH_S:
            answer = _ask()
            _answer = (time.monotonic(), conf, answer)
        rows = _answer[2]
    if isinstance(rows, UserError):
        raise rows
    return rows


def _ask() -> dict[str, Row] | UserError:
    try:
        lines = call(("squeue", "--noheader", "--me", "--states=all", "--format=%i|%T|%j|%r|%Z")).splitlines()
    except UserError as error:
        return error
    rows = (line.strip().split("|", 4) for line in lines)
    return _one_each((row[0], Row(*row[1:])) for row in rows if len(row) == 5)


def _one_each(rows: Iterable[tuple[str, Row]]) -> dict[str, Row]:
    """Number of a job, or of a whole array, → its row, or that of the task which tells most."""
    found: dict[str, Row] = {}
    for number, row in rows:
        # A task is `12_3`; those that wait in one line are `12_[4-7%2]`.
        job = number.partition("_")[0]
        if job not in found or _weight(row) > _weight(found[job]):
            found[job] = row
    return found


def _weight(row: Row) -> int:
    return 3 if row.state == "RUNNING" else 2 if row.alive else int(row.state != "COMPLETED")


def history(numbers: Iterable[str]) -> dict[str, Row]:
    """Jobs that the controller has forgotten, from the accounting; nothing where there is none."""
    try:
        text = call(("sacct", "-n", "-P", "-X", "-o", "JobID,State,JobName", "-j", ",".join(numbers)))
    except UserError:
        return {}
    rows = (line.split("|", 2) for line in text.splitlines())
    # The state may be `CANCELLED by 1000`.
    return _one_each((row[0], Row(row[1].partition(" ")[0], row[2])) for row in rows if len(row) == 3)


def submit(argv: Sequence[str], directory: Path, environment: Mapping[str, str]) -> str:
    """Run `sbatch --parsable`; returns the job's number.

    Raises:
        UserError: Slurm refuses; its words are passed on.
    """
    _forget()
    # On federated clusters the answer is `number;cluster`.
    return call(argv, directory, environment).strip().partition(";")[0]


def cancel(numbers: Iterable[str]) -> None:
    """Ask Slurm to end jobs; those that have ended already are no error."""
    _forget()
    call(("scancel", "--quiet", *numbers))


def release(job: str) -> None:
    """Let a job that was submitted as held run.

    Raises:
        UserError: Slurm refuses.
    """
    _forget()
    call(("scontrol", "release", job))


def requeue(job: str) -> None:
    """Put a running job back into the queue; Slurm then ends its processes.

    Raises:
        UserError: Slurm refuses.
    """
    _forget()
    call(("scontrol", "requeue", job))


def put_off(job: str, pause_s: int, excluded: Sequence[str]) -> None:
    """Let a job that waits start later, and not on some nodes.

    Raises:
        UserError: Slurm refuses.
    """
    call(("scontrol", "update", f"JobId={job}", f"StartTime=now+{pause_s}", f"ExcNodeList={','.join(excluded)}"))


def hostnames(nodes: str) -> list[str]:
    """The nodes of a list such as `gpu[01-04]`; none of an empty one."""
    return call(("scontrol", "show", "hostnames", nodes)).split() if nodes else []


def node_states(partition: str) -> dict[str, str]:
    """Node → state, such as `idle` or `down*`; an asterisk says that it does not answer."""
    chosen = (f"--partition={partition}",) if partition else ()
    rows = (line.split() for line in call(("sinfo", "--noheader", "--Node", *chosen, "--format=%N %T")).splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2}


def is_lost(state: str) -> bool:
    """Whether a node in this state has left its jobs alone."""
    return state.endswith("*") or state.startswith(("down", "fail"))


def is_out(state: str) -> bool:
    """Whether a node in this state takes no jobs."""
    return is_lost(state) or state.startswith(("drain", "maint", "unknown", "power"))


def _forget() -> None:
    global _answer
    _answer = None


def call(argv: Sequence[str], directory: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Output of a Slurm command.

    Raises:
        UserError: it is not installed, does not answer, or refuses.
    """
    try:
        done = subprocess.run(
            argv, cwd=directory, env=environment, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{argv[0]} is not installed here", where="Slurm", mend="go to a login node") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{argv[0]} has not answered for {_ANSWER_S} s", where="Slurm", mend="try again") from None
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        lost = any("configuration source" in line for line in told)
        mend = "set SLURM_CONF; vqscale cluster status names that of a throw-away Slurm" if lost else ""
        raise UserError(told[-1].removeprefix(f"{argv[0]}: ").removeprefix("error: "), where=argv[0], mend=mend)
    return done.stdout
