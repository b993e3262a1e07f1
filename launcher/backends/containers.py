"""How Slurm's nodes start a stage in the profile's container: by Pyxis, a part of `srun` there, or by Apptainer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cluster.container import ContainerSettings
from launcher.backends.base import Job
from vqscale.errors import UserError


def srun_options(job: Job, variables: Iterable[str]) -> tuple[str, ...]:
    """Options of `srun`, for Pyxis.

    Args:
        job: the job.
        variables: names of the stage's variables. Those that the image has too would else keep its values.
    """
    container = job.profile.container
    if container is None or container.runtime != "pyxis":
        return ()
    return (
        f"--container-image={container.image}",
        f"--container-mounts={_mounts(job, container)}",
        f"--container-workdir={container.workdir or job.source}",
        f"--container-env={','.join(variables)}",
    )


def before_agent(job: Job, gpus: int) -> tuple[str, ...]:
    """What stands before the agent's command on each node, for Apptainer.

    Args:
        job: the job.
        gpus: of each node; with some, the host's driver is brought along.
    """
    container = job.profile.container
    if container is None or container.runtime != "apptainer":
        return ()
    return (
        *("apptainer", "exec", *(("--nv",) if gpus else ()), "--bind", _mounts(job, container)),
        *("--pwd", container.workdir or str(job.source), container.image),
    )


def python(job: Job) -> str:
    """Interpreter of the stages."""
    container = job.profile.container
    return (container.python if container else None) or job.python


def _mounts(job: Job, container: ContainerSettings) -> str:
    """The profile's, and the folders that every stage needs.

    Raises:
        UserError: such a folder has a name that cannot be written here.
    """
    own = [job.run] if container.workdir else [job.run, job.source]
    return ",".join([*container.mounts, *(f"{_plain(path)}:{path}" for path in own)])


def _plain(path: Path) -> Path:
    if set(str(path)) & set(",:\n"):
        mend = "choose a folder without commas and colons; neither Pyxis nor Apptainer can mount it"
        raise UserError("cannot be mounted in a container", where=str(path), mend=mend)
    return path
