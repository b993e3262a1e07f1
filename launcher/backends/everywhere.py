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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.preflight.node import ENDPOINT, INDEX, NODE
from cluster.profile import Profile
from cluster.rendezvous import agent_environment, inherited
from cluster.slurm import SlurmSettings
from launcher.backends.base import SOURCE
from launcher.backends.slurm import FIND_EACH_OTHER
from vqscale.errors import UserError

_END_S = 20.0


@dataclass(frozen=True)
class Errand:
    """A module that is to run once on each node."""

    profile: Profile
    module: str
    arguments: tuple[str, ...]
    nodes: int
    wait_s: int
    """Seconds that it may wait for nodes that are busy."""
    limit_s: int
    """Seconds that it may take, once it runs."""


def run_everywhere(errand: Errand) -> Iterator[str]:
    """Lines that the nodes print, standard error among them, in the order in which they come.

    Raises:
        UserError: the profile's backend cannot do this, or its program is not there.
    """
    commands: dict[str, Callable[[Errand], Sequence[str]]] = {"local": _local, "slurm": _slurm}
    backend = errand.profile.backend
    if backend not in commands:
        mend = f"backends that can: {', '.join(commands)}"
        raise UserError(f"the nodes of backend {backend} cannot be asked yet", where=errand.profile.name, mend=mend)
    argv = commands[backend](errand)
    allowed = (*errand.profile.inherit, "SLURM_CONF")
    environment = inherited(os.environ, allowed) | _variables(errand.profile)
    return _lines(argv, environment, errand.wait_s + errand.limit_s)


def _variables(profile: Profile) -> dict[str, str]:
    found = {variable.name: variable.value for variable in agent_environment(grace_s=profile.grace_s)}
    return {"OMP_NUM_THREADS": "1", **found, **profile.environment}


def _module(errand: Errand) -> tuple[str, ...]:
    return (sys.executable, "-m", errand.module, *errand.arguments)


def _local(errand: Errand) -> Sequence[str]:
    if errand.nodes != 1:
        raise UserError(f"{errand.nodes} nodes", where="--nodes", mend=f"profile {errand.profile.name} is one machine")
    return _module(errand)


def _slurm(errand: Errand) -> Sequence[str]:
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
    return ("srun", *_srun_options(slurm, errand), "bash", "-c", script)


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


def _lines(argv: Sequence[str], environment: dict[str, str], limit_s: float) -> Iterator[str]:
    try:
        run = subprocess.Popen(
            argv,
            cwd=SOURCE,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except FileNotFoundError:
        raise UserError(f"{argv[0]} is not installed here", where="vqscale doctor", mend="go to a login node") from None
    timer = threading.Timer(limit_s, run.terminate)
    timer.start()
    try:
        assert run.stdout is not None
        yield from run.stdout
    finally:
        timer.cancel()
        _end(run)


def _end(run: subprocess.Popen[str]) -> None:
    """It ends by itself, or is asked to: srun takes its job along, and the agent its ranks."""
    if run.poll() is None:
        run.terminate()
    try:
        run.wait(_END_S)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
    assert run.stdout is not None
    run.stdout.close()
