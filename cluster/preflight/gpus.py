"""GPUs of a machine and their health, by nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.preflight.verdict import Verdict, expect

_ASKED = ("index", "name", "temperature.gpu")
_MAYBE = (
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "clocks_event_reasons.active",
    "clocks_throttle_reasons.active",
)
"""Fields that not every driver knows; one that is unknown spoils the whole answer, so each is asked by itself."""
_SLOWED = {0x08: "slowed by the hardware", 0x20: "slowed by heat", 0x40: "slowed by heat", 0x80: "power brake"}
"""Bits of the reasons for lower clocks that are a fault; idleness and the power limit are none."""
_ANSWER_S = 30


@dataclass(frozen=True)
class Gpus:
    """What nvidia-smi says."""

    rows: list[dict[str, str]]
    """Field → text, for each GPU."""
    fault: str = ""
    """Why it could not be asked, where it is installed."""


def look_at_gpus() -> Gpus:
    """Ask nvidia-smi; no GPU where it is not installed."""
    if shutil.which("nvidia-smi") is None:
        return Gpus([])
    try:
        rows = _query(_ASKED)
    except (OSError, subprocess.SubprocessError) as error:
        told = error.stdout if isinstance(error, subprocess.CalledProcessError) else ""
        return Gpus([], " ".join((told or str(error)).split())[:200])
    for name in _MAYBE:
        try:
            more = _query((name,))
        except (OSError, subprocess.SubprocessError):
            continue
        rows = [{**row, **extra} for row, extra in zip(rows, more, strict=True)]
    return Gpus(rows)


def _query(fields: Sequence[str]) -> list[dict[str, str]]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    return parse(fields, done.stdout)


def parse(fields: Sequence[str], text: str) -> list[dict[str, str]]:
    """The rows of nvidia-smi's CSV without a head."""
    lines = (line.split(", ") for line in text.splitlines() if line.strip())
    return [dict(zip(fields, (cell.strip() for cell in line), strict=True)) for line in lines]


def judge_gpus(where: str, gpus: Gpus, torch_sees: int, wanted: int, *, built: bool) -> list[Verdict]:
    """Number and health of a machine's GPUs.

    Args:
        where: the machine.
        gpus: what nvidia-smi says.
        torch_sees: how many torch can use.
        wanted: how many the profile promises on each node.
        built: whether torch was built for GPUs at all.
    """
    if gpus.fault:
        return [Verdict("GPUs", where, "FAIL", f"nvidia-smi: {gpus.fault}", mend="the driver is ill: reboot the node")]
    promised = wanted or len(gpus.rows)
    if not promised:
        return [Verdict("GPUs", where, "n/a", "none")]
    return [_judge_number(where, gpus, torch_sees, promised, built), *(_judge_one(where, row) for row in gpus.rows)]


def _judge_number(where: str, gpus: Gpus, torch_sees: int, promised: int, built: bool) -> Verdict:
    kinds = ", ".join(sorted({row["name"] for row in gpus.rows})) or "none"
    value, limit = f"torch sees {torch_sees}, nvidia-smi {len(gpus.rows)} ({kinds})", f"{promised} a node"
    if not built:  # on every node alike, and where it is meant, stages run on the CPU
        mend = "install a torch that is built for GPUs, or train on the CPU"
        return Verdict("GPUs", where, "warn", f"torch is built without CUDA; {value}", limit, mend)
    few = "correct slurm.gpus_per_node in the profile, or leave the node out (slurm.exclude)"
    mend = "install a torch for this driver's CUDA" if len(gpus.rows) >= promised else few
    return expect("GPUs", where, torch_sees >= promised, value, limit=limit, mend=mend)


def _judge_one(where: str, row: Mapping[str, str]) -> Verdict:
    faults, slow = _faults(row), _slowed(row)
    name = f"GPU {row['index']}"
    if faults:
        mend = "drain the node and reset the GPU; meanwhile leave it out (slurm.exclude)"
        return Verdict(name, where, "FAIL", "; ".join(faults), "no faults", mend)
    value = f"{row['temperature.gpu']} °C" + (f", {', '.join(slow)}" if slow else "")
    return expect(name, where, not slow, value, limit="full clocks", mend="look at cooling and power", word="warn")


def _faults(row: Mapping[str, str]) -> list[str]:
    errors, remap = row.get("ecc.errors.uncorrected.volatile.total", ""), row.get("remapped_rows.pending", "")
    found = [f"{errors} uncorrected ECC errors since boot"] if errors.isdigit() and int(errors) else []
    return found + (["rows wait to be remapped"] if remap.lower() in ("yes", "1") else [])


def _slowed(row: Mapping[str, str]) -> list[str]:
    text = row.get("clocks_event_reasons.active") or row.get("clocks_throttle_reasons.active") or ""
    bits = int(text, 16) if text.startswith("0x") else 0
    return sorted({words for bit, words in _SLOWED.items() if bits & bit})
