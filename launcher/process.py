"""Processes on this host: who is alive, who belongs to a run, how they are ended. Linux only (`/proc`)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PROC = Path("/proc")
_LIBC = ctypes.CDLL(None, use_errno=True)  # opened here: dlopen is not safe between fork and exec


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from a later one with the same id: host, boot, and start time."""
    return {"pid": pid, "started": _start_time(pid), "boot": _boot(), "host": socket.gethostname()}


def is_alive(who: Mapping[str, Any]) -> bool | None:
    """Whether the process of an `identity` still runs; None when it belongs to another host."""
    if who["host"] != socket.gethostname():
        return None
    return who["boot"] == _boot() and who["started"] is not None and _start_time(who["pid"]) == who["started"]


def terminate(who: Mapping[str, Any]) -> None:
    """Send TERM to the process of an `identity`, if it is still that one."""
    if is_alive(who):
        _send(who["pid"], signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose own parent dies, so that they can be reaped here."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(parent: int) -> None:
    """Ask the kernel for TERM when the parent dies. Runs in the child, between fork and exec."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request was made
        os._exit(1)


def tagged(name: str, value: str) -> list[int]:
    """Processes that were started with the variable `name` set to `value`.

    Workers of torch's elastic agent have sessions of their own, so neither a process group nor a session
    finds all of a stage; what they inherit does. A zombie's environment reads as empty: it is not listed.
    """
    entry = f"{name}={value}".encode()
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if entry in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def tags(name: str) -> Counter[str]:
    """Value of the variable `name` → how many processes were started with it; one walk over all processes."""
    head, found = f"{name}=".encode(), Counter[str]()
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                entries = (folder / "environ").read_bytes().split(b"\0")
                found.update({e[len(head) :].decode(errors="replace") for e in entries if e.startswith(head)})
    return found


def variable(pid: int, name: str) -> str | None:
    """What a process was started with as the value of a variable; None when it had none, or is gone."""
    try:
        entries = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = [entry.partition(b"=")[2] for entry in entries if entry.startswith(f"{name}=".encode())]
    return found[0].decode(errors="replace") if found else None


def end_tagged(name: str, value: str, grace_s: float) -> int:
    """End all processes of a tag: TERM, a wait of at most `grace_s`, KILL. Returns how many there were."""
    found = tagged(name, value)
    _send_all(found, signal.SIGTERM)
    limit = time.monotonic() + grace_s
    while tagged(name, value) and time.monotonic() < limit:
        time.sleep(0.05)
    # Processes may still be starting others, so one round of KILL need not be the last.
    for _ in range(100):
        left = tagged(name, value)
        if not left:
            break
        _send_all(left, signal.SIGKILL)
        time.sleep(0.05)
    return len(found)


def reap_orphans() -> None:
    """Collect adopted children that have ended, so that none stays a zombie. Waits for those still ending."""
    limit = time.monotonic() + 2
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < limit:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.01)


def _send_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        _send(pid, number)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None when it is gone or a zombie."""
    try:
        # The name in parentheses may hold spaces and parentheses of its own; fields count from behind it.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
