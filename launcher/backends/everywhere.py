"""Runs a module once on every node of a profile and reads what it prints, as it comes: for checks, not for stages.

The module is told its place by the variables of `cluster.preflight.node`. Each node gets the environment of a stage:
the profile's variables above an allow-list of the shell's; in the profile's container, where it has one.
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
from cluster.ssh import Host, SshSettings
from launcher.backends.base import SOURCE
from launcher.backends.containers import Inside, before_command, srun_options
from launcher.backends.kubernetes import FOR_CLIENT, refuse_unseen
from launcher.backends.kubernetes_manifest import Expanded, Pods, dump, meeting, object_name, settings_of
from launcher.backends.slurm import FIND_EACH_OTHER
from launcher.backends.ssh import OWN, connect
from launcher.hosts import Spec
from launcher.kube_api import RUN_LABEL, run_label
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import write_bytes, write_json

_GRACE_S = 5
_END_S = 30.0
"""Above the grace, and above what a cluster is given to end pods."""


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


def run_everywhere(errand: Errand) -> Iterator[str]:
    """Lines that the nodes print, standard error among them, in the order in which they come.

    Raises:
        UserError: the backend's program is not there, the nodes cannot see the folder, or there are not so many.
    """
    refuse_too_many(errand.profile, errand.nodes)
    allowed = (*errand.profile.inherit, "SLURM_CONF", "SSH_AUTH_SOCK", *FOR_CLIENT)
    environment = inherited(os.environ, allowed) | _variables(errand.profile)
    return _lines(_COMMANDS[errand.profile.backend](errand), environment, errand.wait_s + errand.limit_s)


def refuse_too_many(profile: Profile, nodes: int) -> None:
    """Where no cluster chooses the nodes, the profile says how many there are.

    Raises:
        UserError: there are fewer.
    """
    if profile.backend == "local" and nodes != 1:
        raise UserError(f"{nodes} nodes", where="--nodes", mend=f"profile {profile.name} is one machine")
    if profile.ssh and nodes > len(profile.ssh.usable):
        but = " that are not excluded" if profile.ssh.exclude else ""
        mend = f"profile {profile.name} has {len(profile.ssh.usable)} hosts{but}"
        raise UserError(f"{nodes} nodes", where="--nodes", mend=mend)


def _variables(profile: Profile) -> dict[str, str]:
    found = {variable.name: variable.value for variable in agent_environment(grace_s=profile.grace_s)}
    return {"OMP_NUM_THREADS": "1", **found, **profile.environment}


def _module(errand: Errand, python: str = sys.executable) -> tuple[str, ...]:
    return (python, "-m", errand.module, *errand.arguments)


def _local(errand: Errand) -> Sequence[Sequence[str]]:
    return [_module(errand)]


def _slurm(errand: Errand) -> Sequence[Sequence[str]]:
    """One `srun`. In a container of Pyxis's there is no `scontrol`: an allocation around it asks where all meet."""
    slurm, variables = errand.profile.slurm, _variables(errand.profile)
    assert slurm is not None
    inside = Inside(errand.profile.container, errand.folder, SOURCE)
    ahead = [
        "set -e -o pipefail",
        *slurm.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f"cd {shlex.quote(str(SOURCE))}",
        FIND_EACH_OTHER,
    ]
    place = f'export {NODE}="$SLURMD_NODENAME" {INDEX}="$SLURM_NODEID" {ENDPOINT}="$endpoint"'
    command = (*before_command(inside, slurm.gpus_per_node), *_module(errand, inside.python(sys.executable)))
    asked = _asked(slurm, errand)
    in_pyxis = srun_options(inside, (*variables, ENDPOINT))
    if not in_pyxis:
        return [("srun", *asked, "bash", "-c", "\n".join([*ahead, place, f"exec {shlex.join(command)}"]))]
    own = f'{place.replace("$endpoint", f"${ENDPOINT}")}; exec "$@"'
    step = ("srun", "--kill-on-bad-exit=0", *in_pyxis, "bash", "-c", own, "node", *command)
    outer = "\n".join([*ahead, f'export {ENDPOINT}="$endpoint"', f"exec {shlex.join(step)}"])
    return [("salloc", "--quiet", *asked, "bash", "-c", outer)]


def _asked(slurm: SlurmSettings, errand: Errand) -> list[str]:
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
    }
    return [*(f"--{name}={value}" for name, value in asked.items() if value is not None), *slurm.options]


def _ssh(errand: Errand) -> Sequence[Sequence[str]]:
    """`launcher.hosts` for each host by itself: one that cannot be reached does not end the others."""
    ssh = errand.profile.ssh
    assert ssh is not None
    hosts = ssh.usable[: errand.nodes]
    write_json(RunLayout(errand.folder).info, {"doctor": True})  # what a host looks for before it starts anything
    port = ssh.rendezvous_port or 20000 + zlib.crc32(str(errand.folder).encode()) % 10000
    endpoint = f"{hosts[0].address}:{port}" if len(hosts) > 1 else ""
    files = [errand.folder / f"host-{index}.json" for index in range(len(hosts))]
    for index, (host, path) in enumerate(zip(hosts, files, strict=True)):
        place = {NODE: host.name, INDEX: str(index), ENDPOINT: endpoint, ADDRESS: host.address if endpoint else ""}
        write_json(path, asdict(_spec(errand, ssh, host, place)))
    return [(sys.executable, "-m", "launcher.hosts", str(path)) for path in files]


def _kubernetes(errand: Errand) -> Sequence[Sequence[str]]:
    """A JobSet, or TrainJob, as that of a stage; what `launcher.kube` does with it is what it does with a stage."""
    profile = errand.profile
    refuse_unseen(profile, errand.folder)
    kubernetes, container = settings_of(profile)
    name = object_name(errand.folder, "doctor", 1)
    endpoint, index = meeting(kubernetes, name)
    # The name of the node alone would be that of two pods which are on the same one.
    place = f'export {NODE}="${NODE}-${index}" {INDEX}="${index}" {ENDPOINT}="$1" {ADDRESS}="$2"; shift 2; exec "$@"'
    where = (endpoint, Expanded("$(POD_IP)")) if errand.nodes > 1 else ("", "")
    pods = Pods(
        profile=profile,
        name=name,
        labels={"app.kubernetes.io/name": "vqscale", RUN_LABEL: run_label(errand.folder)},
        nodes=errand.nodes,
        processes=1,
        command=["sh", "-c", place, "node", *where, *_module(errand, container.python or sys.executable)],
        environment=_variables(profile),
        source=SOURCE,
    )
    path = errand.folder / "manifest.yaml"
    write_bytes(path, dump(pods.manifest()).encode())
    context = ("--context", kubernetes.context) if kubernetes.context else ()
    return [(sys.executable, "-m", "launcher.kube", "--grace", str(_GRACE_S), "--remove", *context, "--", str(path))]


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


_COMMANDS: dict[str, Callable[[Errand], Sequence[Sequence[str]]]] = {
    "local": _local, "slurm": _slurm, "ssh": _ssh, "kubernetes": _kubernetes,
}  # fmt: skip
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
