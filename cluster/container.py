"""What a profile says of the container that stages run in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.section import Section

Image = Annotated[str, Field(pattern=r"^[A-Za-z0-9/][A-Za-z0-9._/:@#+-]*$")]
"""An image: `ghcr.io/me/vqscale:0.1`, `nvcr.io#nvidia/pytorch:26.10` (Pyxis), `docker://...`, or a file."""
_PATH = r"/[^\x00-\x1f\x7f,:]*"
Place = Annotated[str, Field(pattern=rf"^{_PATH}$")]
"""An absolute path inside the container, or on the host; neither comma nor colon, which part the mounts."""
Mount = Annotated[str, Field(pattern=rf"^{_PATH}:{_PATH}(:r[ow])?$")]
"""A folder of the host in the container: `/data:/data:ro`."""


class ContainerSettings(Section):
    """The container of all stages. With Slurm each node's agent runs in it; what requeues a job stays on the host."""

    image: Image
    """The image: `ghcr.io/me/vqscale:0.1`, for Pyxis `nvcr.io#nvidia/pytorch:26.10`, or a file."""
    runtime: Literal["pyxis", "apptainer"] | None = None
    """What starts it under Slurm: Pyxis, which is a part of `srun` there, or Apptainer. None for Kubernetes."""
    mounts: tuple[Mount, ...] = ()
    """Folders of the host that stages need, such as those of the data. The run directory is mounted by itself, and so
    is the code where `workdir` is left out. For Slurm; with Kubernetes there are `kubernetes.volumes`."""
    workdir: Place | None = None
    """Folder of the code in the image; left out, the code that submits is mounted, and used."""
    python: Place | None = None
    """Interpreter in the image; left out, the path of the one that submits, which has to be there."""

    @model_validator(mode="after")
    def _is_named(self) -> ContainerSettings:
        if self.runtime == "pyxis" and self.image.startswith("docker://"):
            raise ValueError("image: Pyxis takes `registry#name:tag`, or a file")
        return self
