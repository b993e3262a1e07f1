"""How Slurm's nodes start a stage in the profile's container: by Pyxis, a part of `srun` there, or by Apptainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.container import ContainerSettings
from vqscale.errors import UserError


@dataclass(frozen=True)
class Inside:
    """What is started in a profile's container, or in none."""

    container: ContainerSettings | None
    folder: Path
    """Of the run, or of what else the nodes share; mounted."""
    source: Path
    """Of the code that submits; mounted where the image has none."""

    def python(self, otherwise: str) -> str:
        """Interpreter in the image; the one that submits where the profile names none."""
        return (self.container.python if self.container else None) or otherwise

    @property
    def directory(self) -> str:
        """Where to start."""
        return (self.container.workdir if self.container else None) or str(self.source)


def srun_options(inside: Inside, variables: Iterable[str]) -> tuple[str, ...]:
    """Options of `srun`, for Pyxis.

    Args:
        inside: what is started.
        variables: names of the stage's variables. Those that the image has too would else keep its values.
    """
    container = inside.container
    if container is None or container.runtime != "pyxis":
        return ()
    return (
        f"--container-image={container.image}",
        f"--container-mounts={_mounts(inside, container)}",
        f"--container-workdir={inside.directory}",
        f"--container-env={','.join(variables)}",
    )


def before_command(inside: Inside, gpus: int) -> tuple[str, ...]:
    """What stands before the command on each node, for Apptainer.

    Args:
        inside: what is started.
        gpus: of each node; with some, the host's driver is brought along.
    """
    container = inside.container
    if container is None or container.runtime != "apptainer":
        return ()
    return (
        *("apptainer", "exec", *(("--nv",) if gpus else ()), "--bind", _mounts(inside, container)),
        *("--pwd", inside.directory, container.image),
    )


def _mounts(inside: Inside, container: ContainerSettings) -> str:
    """The profile's, and the folders that every stage needs.

    Raises:
        UserError: such a folder has a name that cannot be written here.
    """
    own = [inside.folder] if container.workdir else [inside.folder, inside.source]
    return ",".join([*container.mounts, *(f"{_plain(path)}:{path}" for path in own)])


def _plain(path: Path) -> Path:
    if set(str(path)) & set(",:\n"):
        mend = "choose a folder without commas and colons; neither Pyxis nor Apptainer can mount it"
        raise UserError("cannot be mounted in a container", where=str(path), mend=mend)
    return path
