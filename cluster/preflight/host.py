"""One machine: its Python and packages, limits, shared memory, clock, network interfaces and a folder's disk."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cluster.preflight.verdict import Verdict, at_least, expect
from vqscale.sources import sources_hash

_OPEN_FILES = 4096
_SHM_GB = 1.0
_FREE_GB = 10.0
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
    found = [dist for dist in metadata.distributions() if dist.name]
    # Backwards: of several versions the first on the path is the one that is imported.
    packages = {_normal(dist.name): dist.version for dist in reversed(found)}
    shm = Path("/dev/shm")
    return Host(
        python=platform.python_version(),
        packages=packages,
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
    files, shm = host.open_files, host.shm_free
    return [
        expect(
            *("open files", where, files < 0 or files >= _OPEN_FILES, "no limit" if files < 0 else str(files)),
            limit=f"at least {_OPEN_FILES}",
            mend=f"ulimit -n {_OPEN_FILES}, for good in /etc/security/limits.conf",
            word="warn",
        ),
        *([_judge_locked(where, host)] if host.infiniband else []),
        Verdict("shared memory", where, "n/a", "no /dev/shm")
        if shm is None
        else expect(
            *("shared memory", where, shm >= _SHM_GB * 1e9, f"{shm / 1e9:.1f} GB free"),
            limit=f"at least {_SHM_GB:g} GB",
            mend="give the container more (--shm-size), or clear /dev/shm: NCCL needs it between the GPUs of a node",
            word="warn",
        ),
        _judge_clock(where, host),
    ]


def _judge_locked(where: str, host: Host) -> Verdict:
    return expect(
        *("locked memory", where, host.locked_memory < 0, "no limit" if host.locked_memory < 0 else "limited"),
        limit="no limit, for InfiniBand",
        mend="ulimit -l unlimited; under Slurm in the unit of slurmd (LimitMEMLOCK=infinity)",
    )


def _judge_clock(where: str, host: Host) -> Verdict:
    if host.synchronised is None:
        return Verdict("clock", where, "n/a", "the kernel does not say")
    value = "synchronised" if host.synchronised else "not synchronised, says the kernel"
    return expect("clock", where, host.synchronised, value, mend="start chronyd or systemd-timesyncd", word="warn")


def judge_packages(where: str, host: Host, constraints: Mapping[str, str] | None, required: list[str]) -> list[Verdict]:
    """Installed packages against the versions that vqscale is tested with.

    Args:
        where: the machine.
        host: its facts.
        constraints: package → version; None where the file is not there.
        required: packages that vqscale cannot do without.
    """
    missing = [name for name in required if name not in host.packages]
    there = expect(
        *("packages", where, not missing, f"lacks {', '.join(missing)}" if missing else f"all {len(required)} needed"),
        mend="make setup",
    )
    if constraints is None:
        return [there, Verdict("versions", where, "n/a", "no constraints.txt beside the code")]
    other = [
        f"{name} {host.packages[name]} ({version})"
        for name, version in constraints.items()
        if host.packages.get(name, version).partition("+")[0] != version
    ]
    value = f"Python {host.python}, torch {host.packages.get('torch', 'is missing')}" + (
        f"; not as tested: {_few(other)}" if other else ""
    )
    return [there, expect("versions", where, not other, value, limit="constraints.txt", mend="make setup", word="warn")]


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_constraints(path: Path) -> dict[str, str] | None:
    """Package → version of a constraints file; None where there is none."""
    if not path.is_file():
        return None
    pairs = (line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {_normal(name): version.strip() for name, version in pairs}


def required_packages() -> list[str]:
    """Names of the packages that vqscale asks for, without those of extras."""
    asked = [line for line in metadata.requires("vqscale") or [] if "extra ==" not in line]
    return [_normal(found[0]) for line in asked if (found := re.match(r"[\w.-]+", line))]


def _normal(name: str) -> str:
    """Names of packages are the same whatever their case, with `_` or `-`."""
    return name.strip().lower().replace("_", "-")


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
    return expect(
        *(f"{library} network", where, found, f"{name}={asked}; there are {', '.join(host.interfaces)}"),
        mend=f"set {name} in the profile's environment to one of them",
    )


@dataclass(frozen=True)
class Folder:
    """What a folder's disk can do, as seen from one machine."""

    path: str
    free: int
    """Bytes."""
    write_mb_s: float
    """MB/s of one file that is written and synced."""
    fault: str = ""
    """Why it could not be measured; the other figures are 0 then."""


def look_at_folder(folder: Path, name: str, megabytes: int = 64) -> Folder:
    """Write, sync and remove a file of random bytes; a compressing file system is not flattered.

    Args:
        folder: where; it has to be there.
        name: of the file, different on every machine.
        megabytes: its size in MB.
    """
    block, path = os.urandom(1 << 20), folder / name
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        took = time.perf_counter() - began
        free = shutil.disk_usage(folder).free
        path.unlink()
    except OSError as error:
        return Folder(str(folder), 0, 0.0, error.strerror or str(error))
    return Folder(str(folder), free, megabytes * len(block) / 1e6 / took)


def judge_folder(where: str, folder: Folder, floor: float | None) -> list[Verdict]:
    """Space and speed of the folder of runs."""
    mend = "choose another folder with $VQSCALE_RUNS"
    if folder.fault:
        return [Verdict("run folder", where, "FAIL", f"{folder.path}: {folder.fault}", mend=mend)]
    enough = folder.free >= _FREE_GB * 1e9
    return [
        expect(
            *("disk space", where, enough, f"{folder.free / 1e9:,.1f} GB free in {folder.path}"),
            limit=f"at least {_FREE_GB:g} GB",
            mend=f"clear some (vqscale checkpoints prune), or {mend}",
            word="warn",
        ),
        at_least("write and sync", where, folder.write_mb_s, floor, "MB/s", mend),
    ]
