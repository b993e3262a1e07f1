"""Stand-ins for Slurm's commands: shell scripts in a folder at the head of PATH (the fixture `fakes`)."""

from __future__ import annotations

from pathlib import Path

from launcher.backends import slurm_queue


def stand_in(folder: Path, name: str, script: str) -> None:
    slurm_queue._forget()
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def queued(fakes: Path, *rows: str) -> None:
    """What `squeue` answers; rows are `NUMBER|STATE|REASON`, jobs 10 and 20 those of the run `mine`."""
    names = {"10": "vqscale-mine-generate", "20": "vqscale-mine-pack"}
    parts = [row.split("|") for row in rows]
    rows = tuple(f"{n}|{state}|{names.get(n, 'other')}|{reason}|/elsewhere" for n, state, reason in parts)
    stand_in(fakes, "squeue", f"cat <<'END'\n{''.join(row + chr(10) for row in rows)}END")
