"""Which jobs of Slurm are a run's: those that its record `slurm.json` names, and those that nobody could record.

A job is recorded as soon as Slurm has given it a number, and the first of a chain is held until all of them are. So
what a kill or an answer that never came leaves behind does nothing: it is held, or waits for what is held, and would
refuse to run (`launcher.batch`). Whoever submits the run next ends it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from launcher.backends import slurm_queue as queue
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json


def job_name(run: Path, stage: str) -> str:
    """What the job of a stage is called."""
    return "vqscale-" + re.sub(r"[^A-Za-z0-9._-]", "_", f"{run.name}-{stage}")


def record(layout: RunLayout) -> dict[str, Any]:
    """`jobs`: stage → number of its newest job; `cancelled`: whether a person ended them."""
    found: dict[str, Any] = read_json(layout.slurm) or {"jobs": {}, "cancelled": False}
    return found


def jobs(layout: RunLayout) -> dict[str, str]:
    """Stage → number of its newest job."""
    return dict(record(layout)["jobs"])


def put_down(layout: RunLayout, found: Mapping[str, str], cancelled: bool = False) -> None:
    """Write the record; there is none of a run that has no jobs."""
    if found:
        write_json(layout.slurm, {"jobs": dict(found), "cancelled": cancelled})
    else:
        layout.slurm.unlink(missing_ok=True)


def ours(layout: RunLayout, rows: Mapping[str, queue.Row]) -> dict[str, queue.Row]:
    """Stage → its recorded job, among all jobs by number."""
    found = {stage: rows[number] for stage, number in jobs(layout).items() if number in rows}
    return {stage: row for stage, row in found.items() if row.name == job_name(layout.root, stage)}


def alive(layout: RunLayout) -> list[str]:
    """Numbers of the run's jobs that have not ended, as of now: the recorded ones, then those that nobody recorded.

    Raises:
        UserError: Slurm cannot be asked.
    """
    rows, known = queue.jobs(fresh=True), jobs(layout)
    recorded = [known[stage] for stage, row in ours(layout, rows).items() if row.alive]
    head, place = job_name(layout.root, ""), str(layout.root)
    others = (number for number in rows if number not in known.values())
    return [
        *recorded,
        *(n for n in others if rows[n].alive and rows[n].name.startswith(head) and rows[n].place == place),
    ]


def end(layout: RunLayout, numbers: Collection[str], limit_s: float) -> None:
    """Cancel jobs, and wait until Slurm has ended the processes of all that the run has.

    Raises:
        UserError: they do not end.
    """
    queue.cancel(numbers)
    limit = time.monotonic() + limit_s
    while left := alive(layout):
        if time.monotonic() > limit:
            told = ",".join(left)
            raise UserError(f"jobs {told} do not end", where="scancel", mend=f"see squeue -j {told}")
        time.sleep(0.5)
