"""Backend `ssh`: torch's elastic agent on each of several hosts, which share one file system.

The supervisor on the machine that submits runs `launcher.hosts` for each stage, which holds a connection to each host.
"""

from __future__ import annotations

import json
import shlex
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict

from cluster.rendezvous import agent_arguments
from cluster.ssh import Host, SshSettings
from launcher.backends.base import Job, StageCommand
from launcher.backends.supervised import Supervised, rendezvous_id
from launcher.hosts import MARGIN_S, Hosts, Spec
from launcher.job import job_of
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError

OWN = (
    "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "XDG_*", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
)  # fmt: skip
"""Variables that each host has of its own: they are not taken along from the machine that submits."""


class SshBackend(Supervised):
    """Runs stages on the hosts of the profile's section `ssh`."""

    def check(self, job: Job) -> None:
        """There has to be a client of ssh.

        Raises:
            UserError: there is none.
        """
        if shutil.which("ssh") is None:
            raise UserError("is not installed here", where="ssh", mend="apt-get install openssh-client")

    def stage_command(self, job: Job, stage: str, attempt: int) -> StageCommand:
        """`launcher.hosts` with the file that says what each host runs."""
        layout = job.layout
        return StageCommand(
            stage=stage,
            attempt=attempt,
            argv=(job.python, "-m", "launcher.hosts", str(layout.hosts(stage))),
            variables=job.variables(stage, attempt),
            inherit=(*job.profile.inherit, "SSH_AUTH_SOCK"),
            directory=job.source,
            log=layout.attempt(stage, attempt) / "agent.log",
            grace_s=job.profile.grace_s + MARGIN_S,
            script=json.dumps(asdict(self._of_stage(job, stage, attempt)), indent=2) + "\n",
        )

    def clear(self, layout: RunLayout) -> None:
        """End what a supervisor that was killed has left on the hosts.

        Raises:
            UserError: a host cannot be asked.
        """
        job = job_of(layout, tuple(RunState.read(layout).stages))
        lines: list[str] = []
        # Each stage takes hosts from the first on.
        hosts = max((_used(job, stage) for stage in job.stages), key=len)
        spec = _spec(job, dict.fromkeys(hosts, ()), {})
        silent = [host for host, code in Hosts(spec, lines.append).run({}).items() if code]
        if silent:
            words = next((line for line in reversed(lines) if line.startswith(f"{silent[0]}: ")), silent[0])
            raise UserError(words, where="ssh", mend=f"processes of the run may be left on {', '.join(silent)}")

    def _of_stage(self, job: Job, stage: str, attempt: int) -> Spec:
        ssh, used = _settings(job), _used(job, stage)
        name = rendezvous_id(job, stage, attempt)
        # A function of the run and not chosen by the kernel: all hosts have to know it before the first one starts.
        port = ssh.rendezvous_port or 20000 + zlib.crc32(f"{job.run.parent}/{name}".encode()) % 10000
        commands: dict[Host, tuple[str, ...]] = {}
        for number, host in enumerate(used):
            rendezvous = agent_arguments(
                rdzv_id=name,
                processes=job.processes_per_node(stage),
                max_restarts=job.resources(stage).max_restarts,
                nodes=len(used),
                endpoint=f"{used[0].address}:{port}",
                holds_store=number == 0,
                address=host.address,
            )
            commands[host] = self.agent(job, stage, attempt, rendezvous, ssh.python or job.python)
        environment = {variable.name: variable.value for variable in job.variables(stage, attempt)}
        return _spec(job, commands, environment)


def connect(ssh: SshSettings, host: Host, python: str, directory: str) -> tuple[str, ...]:
    """The command that starts `launcher.on_host` on a host; what it shall do comes over its standard input.

    The remote shell reads nothing but two quoted paths: no value of a recipe, and no variable, which other users of the
    machine could see in the list of processes.
    """
    remote = f"cd {shlex.quote(directory)} && exec {shlex.quote(python)} -m launcher.on_host"
    return (
        *("ssh", "-T", "-a", "-x"),
        *(("-F", ssh.config) if ssh.config else ()),
        *(("-l", ssh.user) if ssh.user else ()),
        *(("-p", str(ssh.port)) if ssh.port else ()),
        # ssh keeps the first value that it is given.
        *(word for option in (*ssh.options, *_OPTIONS) for word in ("-o", option)),
        *("--", host.name, remote),
    )


# Never asks for a password; a dead network ends the connection; nothing is shared with other connections or forwarded.
_OPTIONS = (
    "BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=5", "ServerAliveCountMax=3", "ControlPath=none",
    "ClearAllForwardings=yes",
)  # fmt: skip


def _spec(job: Job, commands: Mapping[Host, tuple[str, ...]], environment: dict[str, str]) -> Spec:
    ssh = _settings(job)
    python, directory = ssh.python or job.python, ssh.directory or str(job.source)
    return Spec(
        run=str(job.run),
        directory=directory,
        grace_s=job.profile.grace_s,
        environment=environment,
        inherit=[name for name in job.profile.inherit if name not in OWN],
        own=list(OWN),
        hosts=[
            {
                "host": host.name,
                "ssh": shlex.join(connect(ssh, host, python, directory)),
                "runs": shlex.join(argv),
            }
            for host, argv in commands.items()
        ],
    )


def _used(job: Job, stage: str) -> tuple[Host, ...]:
    return _settings(job).used(job.resources(stage).processes)


def _settings(job: Job) -> SshSettings:
    if job.profile.ssh is None:
        raise ValueError(f"profile {job.profile.name} has no section `ssh`")
    return job.profile.ssh
