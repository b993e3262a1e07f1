"""One machine: what it is, and what to think of its limits, shared memory, clock and network interfaces."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.preflight.packages import installed
from cluster.preflight.verdict import Verdict, expect
from vqscale.sources import sources_hash

_OPEN_FILES = 4096
_SHM_GB = 1.0
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


@dataclass(frozen=True)
class Host:
    """Facts about a machine, as it sees itself."""

    python: str
    packages: dict[str, str]
    code: str
    """Hash of vqscale's own code."""
    cores: int
    open_files: int
    """Soft limit of open files; -1 is none."""
    locked_memory: int
    """Soft limit in bytes; -1 is none."""
    infiniband: bool
    shm_free: int | None
    """Free bytes of /dev/shm; None where there is none."""
    synchronised: bool | None
    """What the kernel says of its clock; None where it does not say."""
    interfaces: list[str]
    """Names of network interfaces."""


def look_at_host() -> Host:
    """Facts about this machine."""
    shm = Path("/dev/shm")
    return Host(
        python=platform.python_version(),
        packages=installed(),
        code=sources_hash(Path(__file__).resolve().parents[2]),
        cores=len(os.sched_getaffinity(0)),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        shm_free=shutil.disk_usage(shm).free if shm.is_dir() else None,
        synchronised=_synchronised(),
        interfaces=[name for _, name in socket.if_nameindex()],
    )


def _synchronised() -> bool | None:
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # no mode is set: it only reads
    except AttributeError:
        return None
    return None if state < 0 else state != _TIME_ERROR


def judge_host(where: str, host: Host) -> list[Verdict]:
    """Limits, shared memory and clock of a machine."""
    locked = [_judge_locked(where, host)] if host.infiniband else []
    return [_judge_files(where, host), *locked, _judge_shared_memory(where, host), _judge_clock(where, host)]


def _judge_files(where: str, host: Host) -> Verdict:
    unlimited = host.open_files < 0
    return expect(
        "open files",
        where,
        unlimited or host.open_files >= _OPEN_FILES,
        "no limit" if unlimited else str(host.open_files),
        limit=f"at least {_OPEN_FILES}",
        mend=f"ulimit -n {_OPEN_FILES}, for good in /etc/security/limits.conf",
        word="warn",
    )


def _judge_locked(where: str, host: Host) -> Verdict:
    unlimited = host.locked_memory < 0
    return expect(
        "locked memory",
        where,
        unlimited,
        "no limit" if unlimited else f"{host.locked_memory / 1e6:,.1f} MB",
        limit="no limit, for InfiniBand",
        mend="ulimit -l unlimited; under Slurm in the unit of slurmd (LimitMEMLOCK=infinity)",
    )


def _judge_shared_memory(where: str, host: Host) -> Verdict:
    if host.shm_free is None:
        return Verdict("shared memory", where, "n/a", "no /dev/shm")
    return expect(
        "shared memory",
        where,
        host.shm_free >= _SHM_GB * 1e9,
        f"{host.shm_free / 1e9:.1f} GB free",
        limit=f"at least {_SHM_GB:g} GB",
        mend="give the container more (--shm-size), or clear /dev/shm: NCCL needs it between the GPUs of a node",
        word="warn",
    )


def _judge_clock(where: str, host: Host) -> Verdict:
    if host.synchronised is None:
        return Verdict("clock", where, "n/a", "the kernel does not say")
    value = "synchronised" if host.synchronised else "not synchronised, says the kernel"
    return expect("clock", where, host.synchronised, value, mend="start chronyd or systemd-timesyncd", word="warn")


def judge_interfaces(where: str, host: Host, variables: Mapping[str, str]) -> list[Verdict]:
    """The network interfaces that the profile names for gloo and NCCL; those that it only excludes are not judged."""
    return [
        _judge_interface(where, host, name, variables[name])
        for name in _INTERFACES
        if variables.get(name) and not variables[name].startswith("^")
    ]


def _judge_interface(where: str, host: Host, name: str, asked: str) -> Verdict:
    """Gloo wants one name, or several; NCCL takes beginnings of names, and whole ones behind `=`."""
    whole = asked.startswith("=") or not name.startswith("NCCL")
    names = [one.strip() for one in asked.lstrip("=").split(",")]
    found = any(there == one if whole else there.startswith(one) for there in host.interfaces for one in names)
    library = name.partition("_")[0].replace("GLOO", "gloo")
    value = f"{name}={asked}; there are {', '.join(host.interfaces)}"
    mend = f"set {name} in the profile's environment to one of them"
    return expect(f"{library} network", where, found, value, mend=mend)
