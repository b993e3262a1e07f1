"""A throw-away Slurm on this machine: its files and the commands of its daemons. `launcher.keeper` runs them.

Several slurmd share the machine, each under a node name and a port of its own, with GPUs that are only device files.
All is below one directory; nothing under /etc is read or written. Debian's build of Slurm can do this (`slurmd -N`).
With a network of their own (`cluster.netns`; root only) the nodes are hosts with addresses, cables and process ids.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import netns
from cluster.netns import Hosts
from vqscale.errors import UserError

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol")
"""What has to be installed."""
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
"""How it is installed on Debian and Ubuntu."""
GPUS = 8
"""Fake GPUs of each node."""

_SYSTEM = ("/usr/sbin", "/usr/local/sbin", "/sbin")
"""Where daemons are, also where a user's PATH does not lead."""
_FOLDERS = ("etc", "run", "log", "state", "dev", "spool")
_HEAD = "# Written by `vqscale cluster up`."
_CONF = """\
{head}
ClusterName=devslurm
SlurmctldHost=localhost({here})
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is requeued waits for as long as a credential lives: seconds here, two minutes by default.
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
CommunicationParameters={listen}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
MpiDefault=none
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
ReturnToService=2
SlurmdTimeout=10
KillWait=20
# Nodes may claim more cores and memory than the machine has.
SlurmdParameters=config_overrides
{nodes}
# What can never run is refused when it is submitted.
EnforcePartLimits=ALL
PartitionName=main Nodes=ALL MaxNodes={most} Default=YES MaxTime=INFINITE State=UP
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=8 RealMemory=64000 Gres=gpu:{gpus}"


@dataclass(frozen=True)
class DevSlurm:
    """A throw-away Slurm below a directory."""

    root: Path
    nodes: int
    network: int = 0
    """Number of the nodes' own network; 0 where they are names and ports on this machine."""

    @property
    def hosts(self) -> Hosts | None:
        """The nodes' own network, if they have one."""
        return Hosts(self.network, self.nodes, self.root / "etc/hosts") if self.network else None

    @property
    def conf(self) -> Path:
        """What SLURM_CONF has to be."""
        return self.root / "etc/slurm.conf"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return tuple(f"node{number}" for number in range(1, self.nodes + 1))

    @property
    def socket(self) -> Path:
        """Where munged answers."""
        return self.root / "run/munge.sock"

    def munged(self) -> tuple[str, ...]:
        """Command of the daemon that signs messages; the others need its socket."""
        places = {
            "key-file": "etc/munge.key",
            "socket": "run/munge.sock",
            "pid-file": "run/munged.pid",
            "log-file": "log/munged.log",
            "seed-file": "etc/seed",
        }
        # --force: it would refuse a directory that others may write, such as one below /tmp.
        return (program("munged"), "--foreground", "--force", *(f"--{k}={self.root / v}" for k, v in places.items()))

    def daemons(self) -> tuple[tuple[str, ...], ...]:
        """Commands of the controller and of the nodes, in the foreground."""
        return ((program("slurmctld"), "-D", "-c"), *(self.node(name) for name in self.names))

    def node(self, name: str) -> tuple[str, ...]:
        """Command of one node's daemon."""
        command = (program("slurmd"), "-D", "-N", name)
        return self.hosts.on(name, command) if self.hosts else command

    def environment(self) -> dict[str, str]:
        """The shell's, pointing at this Slurm; options of another one are left out."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        path = os.pathsep.join([kept.get("PATH", os.defpath), *_SYSTEM])
        return kept | {"SLURM_CONF": str(self.conf), "PATH": path}

    def ask(self, *command: str) -> str:
        """Output of a Slurm command; empty when it fails or has not answered after ten seconds."""
        try:
            done = subprocess.run(
                command, env=self.environment(), capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout if done.returncode == 0 else ""

    def states(self) -> dict[str, str]:
        """Node → state, such as `idle`; empty when the controller does not answer."""
        rows = (line.split() for line in self.ask("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        return {row[0]: row[1] for row in rows if len(row) == 2}

    def ready(self) -> bool:
        """Whether all nodes take jobs."""
        states = self.states()
        return all(states.get(name) == "idle" for name in self.names)

    def drain(self, limit_s: float = 20) -> None:
        """Cancel all jobs and wait for their end: daemons that stop before leave slurmstepd behind."""
        ids = self.ask("squeue", "-h", "-o", "%A").split()
        if ids:
            self.ask("scancel", *ids)
        limit = time.monotonic() + limit_s
        while self.ask("squeue", "-h", "-o", "%A").strip() and time.monotonic() < limit:
            time.sleep(0.1)

    def why(self) -> str:
        """The last line of trouble in the logs, for a start that failed."""
        for path in sorted((self.root / "log").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()
            told = [line for line in lines if re.search(r"\b(fatal|error)\b", line, re.IGNORECASE)]
            if told:
                return f"{path.name}: {told[-1]}"
        return "the logs hold no error"


def program(name: str) -> str:
    """Path of a program, daemons' folders included.

    Raises:
        UserError: it is not installed.
    """
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_SYSTEM))
    if found is None:
        raise UserError(f"{name} is not installed", where="vqscale cluster", mend=INSTALL)
    return found


def missing() -> list[str]:
    """Programs of `PROGRAMS` that are not installed."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def prepare(root: Path, nodes: int, hosts: bool = False) -> DevSlurm:
    """Make the directory and all files of a new Slurm; those of an earlier one are replaced.

    Args:
        root: directory for all of it.
        nodes: number of nodes.
        hosts: whether they are on a network of their own, which is chosen here and made by the keeper.

    Raises:
        UserError: programs or rights are missing, or the directory cannot be used.
    """
    lacking = missing()
    if lacking:
        raise UserError(f"{', '.join(lacking)} not installed", where="vqscale cluster up", mend=INSTALL)
    if hosts and netns.missing():
        raise UserError(netns.missing(), where="vqscale cluster up --hosts", mend="leave --hosts out")
    made = DevSlurm(root, nodes, netns.free_number() if hosts else 0)
    _check_directory(made)
    for name in _FOLDERS:
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True, mode=0o755)
    for name in made.names:
        (root / "spool" / name).mkdir()
    _write_key(root / "etc/munge.key")
    devices = _make_devices(root / "dev")
    _write_settings(made, devices)
    return made


def _check_directory(made: DevSlurm) -> None:
    root = made.root
    # The longest socket is that of a job's step; the kernel takes 107 bytes, and the jobs would only be held.
    socket_length = len(f"{root}/spool/{made.names[-1]}/{made.names[-1]}_1234567.4294967291")
    if not re.fullmatch(r"[A-Za-z0-9_./+-]+", str(root)) or socket_length > 107:
        why = "has characters that slurm.conf cannot hold, or is too long for a socket"
        raise UserError(why, where=str(root), mend="choose a short --dir of letters and digits")
    used = root.exists() and (not root.is_dir() or any(root.iterdir()))
    if used and not (made.conf.is_file() and made.conf.read_text(errors="replace").startswith(_HEAD)):
        raise UserError("is not an empty directory", where=str(root), mend="choose another --dir")


def _write_key(path: Path) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(256))


def _make_devices(folder: Path) -> str:
    """Device files that stand for GPUs; Slurm wants one of its own for each, and only root can make them."""
    if os.geteuid():
        return f"/dev/tty[0-{GPUS - 1}]"
    for number in range(GPUS):
        os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    return f"{folder}/gpu[0-{GPUS - 1}]"


def _write_settings(made: DevSlurm, devices: str) -> None:
    controller, *ports = _free_ports(1 + made.nodes)
    hosts = made.hosts
    each = (
        {"name": name, "port": port, "gpus": GPUS, "host": name if hosts else "localhost"}
        | {"address": hosts.address(name) if hosts else "127.0.0.1"}
        for name, port in zip(made.names, ports, strict=True)
    )
    text = _CONF.format(
        head=_HEAD,
        here=hosts.here if hosts else "127.0.0.1",
        # The controller of a network of its own has to be heard there; its name leads to loopback.
        listen="NoInAddrAny" if hosts else "NoInAddrAny,NoCtldInAddrAny",
        controller=controller,
        user=getpass.getuser(),
        root=made.root,
        nodes="\n".join(_NODE.format(**facts) for facts in each),
        most=made.nodes,
    )
    files = {
        "slurm.conf": text,
        "gres.conf": f"AutoDetect=off\nNodeName=node[1-{made.nodes}] Name=gpu File={devices}\n",
        "cgroup.conf": "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n",
    }
    for name, content in files.items():
        (made.root / "etc" / name).write_text(content, encoding="utf-8")


def _free_ports(number: int) -> Sequence[int]:
    """Ports that nobody listens on; all are held until the last is found, so that they differ."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
