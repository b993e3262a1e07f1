"""Runs a module once on every node of a profile and reads what it prints, as it comes: for checks, not for stages.

The module is told its place by the variables of `cluster.preflight.node`. Each node gets the environment of a stage:
the profile's variables above an allow-list of the shell's.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.preflight.node import ADDRESS, ENDPOINT, INDEX
from cluster.profile import Profile
from cluster.rendezvous import NODE, agent_environment, inherited
from cluster.slurm import SlurmSettings
from cluster.ssh import Host, SshSettings, parse_host
from launcher.backends.base import SOURCE
from launcher.backends.slurm import FIND_EACH_OTHER
from launcher.backends.ssh import OWN, connect
from launcher.hosts import Spec
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import write_json

_END_S = 20.0


@dataclass(frozen=True)
class Errand:
    """A module that is to run once on each node."""

    profile: Profile
    module: str
    arguments: tuple[str, ...]
    folder: Path
    """Of the errand's own, on the file system that all nodes should share."""
    nodes: int
    wait_s: int
    """Seconds that it may wait for nodes that are busy."""
    limit_s: int
    """Seconds that it may take, once it runs."""


def require_askable(profile: Profile) -> None:
    """Refuse a profile whose nodes cannot be asked.

    Raises:
        UserError: its backend has no way.
    """
    if profile.backend not in _COMMANDS:
        mend = f"backends that can: {', '.join(_COMMANDS)}"
        raise UserError(f"the nodes of backend {profile.backend} cannot be asked yet", where=profile.name, mend=mend)


def run_everywhere(errand: Errand) -> Iterator[str]:
    """Lines that the nodes print, standard error among them, in the order in which they come.

    Raises:
        UserError: the profile's backend cannot do this, or its program is not there.
    """
    require_askable(errand.profile)
    allowed = (*errand.profile.inherit, "SLURM_CONF", "SSH_AUTH_SOCK")
    environment = inherited(os.environ, allowed) | _variables(errand.profile)
    return _lines(_COMMANDS[errand.profile.backend](errand), environment, errand.wait_s + errand.limit_s)


def _variables(profile: Profile) -> dict[str, str]:
    found = {variable.name: variable.value for variable in agent_environment(grace_s=profile.grace_s)}
    return {"OMP_NUM_THREADS": "1", **found, **profile.environment}


def _module(errand: Errand, python: str = sys.executable) -> tuple[str, ...]:
    return (python, "-m", errand.module, *errand.arguments)


def _local(errand: Errand) -> Sequence[Sequence[str]]:
    if errand.nodes != 1:
        raise UserError(f"{errand.nodes} nodes", where="--nodes", mend=f"profile {errand.profile.name} is one machine")
    return [_module(errand)]


def _slurm(errand: Errand) -> Sequence[Sequence[str]]:
    slurm = errand.profile.slurm
    assert slurm is not None
    script = "\n".join(
        [
            "set -e -o pipefail",
            *slurm.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in _variables(errand.profile).items()),
            f"cd {shlex.quote(str(SOURCE))}",
            FIND_EACH_OTHER,
            f'export {NODE}="$SLURMD_NODENAME" {INDEX}="$SLURM_NODEID" {ENDPOINT}="$endpoint"',
            f"exec {shlex.join(_module(errand))}",
        ]
    )
    return [("srun", *_srun_options(slurm, errand), "bash", "-c", script)]


def _srun_options(slurm: SlurmSettings, errand: Errand) -> list[str]:
    """What the profile asks of Slurm for a stage, for a job of minutes."""
    asked = {
        "job-name": "vqscale-doctor",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": errand.nodes,
        "ntasks": errand.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-node": slurm.gpus_per_node or None,
        "mem": f"{slurm.memory_gb}G" if slurm.memory_gb else slurm.memory_gb,
        "time": -(-errand.limit_s // 60) + 1,
        "exclude": ",".join(slurm.exclude) or None,
        "immediate": errand.wait_s,
        "kill-on-bad-exit": 0,
    }
    return [*(f"--{name}={value}" for name, value in asked.items() if value is not None), *slurm.options]


def _ssh(errand: Errand) -> Sequence[Sequence[str]]:
    """`launcher.hosts` for each host by itself: one that cannot be reached does not end the others."""
    ssh = errand.profile.ssh
    assert ssh is not None
    hosts = tuple(map(parse_host, ssh.hosts))[: errand.nodes]
    if len(hosts) < errand.nodes:
        mend = f"profile {errand.profile.name} has {len(hosts)} hosts"
        raise UserError(f"{errand.nodes} nodes", where="--nodes", mend=mend)
    write_json(RunLayout(errand.folder).info, {"doctor": True})  # what a host looks for before it starts anything
    port = ssh.rendezvous_port or 20000 + zlib.crc32(str(errand.folder).encode()) % 10000
    endpoint = f"{hosts[0].address}:{port}" if len(hosts) > 1 else ""
    files = [errand.folder / f"host-{index}.json" for index in range(len(hosts))]
    for index, (host, path) in enumerate(zip(hosts, files, strict=True)):
        place = {NODE: host.name, INDEX: str(index), ENDPOINT: endpoint, ADDRESS: host.address if endpoint else ""}
        write_json(path, asdict(_spec(errand, ssh, host, place)))
    return [(sys.executable, "-m", "launcher.hosts", str(path)) for path in files]


def _spec(errand: Errand, ssh: SshSettings, host: Host, place: Mapping[str, str]) -> Spec:
    profile = errand.profile
    python, directory = ssh.python or sys.executable, ssh.directory or str(SOURCE)
    return Spec(
        run=str(errand.folder),
        directory=directory,
        grace_s=profile.grace_s,
        environment={**_variables(profile), **place},
        inherit=[name for name in profile.inherit if name not in OWN],
        own=list(OWN),
        hosts=[
            {
                "host": host.name,
                "ssh": shlex.join(connect(ssh, host, python, directory)),
                "runs": shlex.join(_module(errand, python)),
            }
        ],
    )


_COMMANDS: dict[str, Callable[[Errand], Sequence[Sequence[str]]]] = {"local": _local, "slurm": _slurm, "ssh": _ssh}
"""Backend → the commands that reach all nodes."""


def _lines(commands: Sequence[Sequence[str]], environment: dict[str, str], limit_s: float) -> Iterator[str]:
    """What the commands print, all into one pipe, until all have ended."""
    read, write = os.pipe()
    runs: list[subprocess.Popen[bytes]] = []
    timer = threading.Timer(limit_s, _stop, (runs,))
    try:
        try:
            for argv in commands:
                runs.append(_start(argv, environment, write))
        finally:
            os.close(write)
        timer.start()
        with os.fdopen(read, encoding="utf-8", errors="replace", closefd=False) as lines:
            yield from lines
    finally:
        timer.cancel()
        for run in runs:
            _end(run)
        os.close(read)


def _start(argv: Sequence[str], environment: dict[str, str], output: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv, cwd=SOURCE, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    except FileNotFoundError:
        raise UserError(f"{argv[0]} is not installed here", where="vqscale doctor", mend="go to a login node") from None


def _stop(runs: Sequence[subprocess.Popen[bytes]]) -> None:
    for run in runs:
        run.terminate()


def _end(run: subprocess.Popen[bytes]) -> None:
    """It ends by itself, or is asked to: srun takes its job along, a connection what runs on its host."""
    if run.poll() is None:
        run.terminate()
    try:
        run.wait(_END_S)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
