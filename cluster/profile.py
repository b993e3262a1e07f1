"""Profiles: what vqscale knows about a machine, one typed YAML file each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.container import ContainerSettings
from cluster.kubernetes import KubernetesSettings
from cluster.network import Network
from cluster.section import Section
from cluster.slurm import SlurmSettings
from cluster.ssh import SshSettings

PROFILES = Path(__file__).parent / "profiles"
"""Folder of the profiles that come with vqscale; a file's stem is its name."""

INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_*", "TZ", "TMPDIR", "XDG_*", "VIRTUAL_ENV",
    "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_*", "NVIDIA_*", "AWS_*", "GOOGLE_*", "AZURE_*", "HF_*",
    "FSSPEC_*", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_*",
    "VQSCALE_FAULT",
)  # fmt: skip
"""Variables that stages take over from the shell. Settings of NCCL, gloo and OpenMP are not among them: those
that happen to stand in a shell have made too many runs unrepeatable, so they come from the profile alone. Plans and
records of runs hold these names, never the values: credentials are among them."""


Floor = Annotated[float, Field(gt=0)] | None


class Floors(Section):
    """What `vqscale doctor` holds the machines to; what is left out is reported alone."""

    all_reduce_gb_s: Floor = None
    """Bus bandwidth of an all-reduce over all ranks, in GB/s."""
    read_mb_s: Floor = None
    """Reading shards on each node while all of them do, in MB/s."""
    write_mb_s: Floor = None
    """Writing and syncing a file in the folder of runs, in MB/s."""


class Profile(Section):
    """Facts about the machine or cluster that stages run on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the profile, as in `--on NAME`."""
    description: str = ""
    """What the machine is, in a line."""
    backend: Literal["local", "slurm", "ssh", "kubernetes"] = "local"
    """Who starts the stages: `local` is torch's elastic agent on this machine, `slurm` a job of Slurm for each, `ssh`
    an agent on each of several hosts, `kubernetes` one in each of several pods."""
    slurm: SlurmSettings | None = None
    """What is asked of Slurm, for the backend `slurm`."""
    ssh: SshSettings | None = None
    """The hosts, for the backend `ssh`."""
    kubernetes: KubernetesSettings | None = None
    """What is asked of Kubernetes, for the backend `kubernetes`."""
    container: ContainerSettings | None = None
    """The container that stages run in, for the backends `slurm` and `kubernetes`."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field({})
    """Variables that are set for every stage, above those taken over from the shell."""
    inherit: tuple[str, ...] = INHERITED
    """Names (with `*`) of variables that stages take over from the shell; all others are dropped."""
    floors: Floors = Floors()
    """What `vqscale doctor` expects of the machines."""
    network: Network = Network()
    """The links between GPUs, from which `vqscale bench scaling` predicts."""
    max_processes: Annotated[int, Field(ge=1)] | None = None
    """Most processes that a stage may have here; no limit when it is left out."""
    grace_s: Annotated[int, Field(ge=1)] = 30
    """Seconds that a stage's processes are given to stop by themselves before they are killed."""

    @model_validator(mode="after")
    def _fits(self) -> Profile:
        sections = {"slurm": self.slurm, "ssh": self.ssh, "kubernetes": self.kubernetes}
        for name, section in sections.items():
            if (self.backend == name) != (section is not None):
                raise ValueError(f"the section `{name}` and the line `backend: {name}` go together")
        if self.slurm and self.slurm.lead_s <= self.grace_s + 5:
            raise ValueError(f"slurm.lead_s must be more than 5 s above grace_s ({self.grace_s} s)")
        runtime = self.container.runtime if self.container else None
        if self.container and self.backend not in ("slurm", "kubernetes"):
            raise ValueError(f"the backend `{self.backend}` knows no containers; leave the section `container` out")
        if self.container and (self.backend == "slurm") != (runtime is not None):
            raise ValueError("container.runtime: pyxis or apptainer for the backend `slurm`, nothing for others")
        if self.kubernetes and not self.container:
            raise ValueError("the backend `kubernetes` needs container.image")
        if self.kubernetes and self.container and self.container.mounts:
            raise ValueError("container.mounts: with Kubernetes use kubernetes.volumes")
        return self

    def nodes_of(self, stage: str) -> SlurmSettings | SshSettings | KubernetesSettings | None:
        """The section about the machines that a stage runs on; None for this machine."""
        return self.slurm.of(stage) if self.slurm else self.ssh or self.kubernetes

    def without(self, names: Sequence[str]) -> Profile:
        """The same without some hosts, or where a cluster chooses, avoiding some nodes."""
        sections = {"ssh": self.ssh, "kubernetes": self.kubernetes}
        return self.model_copy(update={key: one.without(names) for key, one in sections.items() if one})

    def resolved(self, folder: Path) -> Profile:
        """The profile without references to other files, which are looked for in `folder`.

        Raises:
            ValueError: such a file is missing or faulty.
        """
        return self.model_copy(update={"ssh": self.ssh.resolved(folder)}) if self.ssh else self


def profile_names() -> list[str]:
    """Names of the profiles that come with vqscale."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def profile_path(name: str) -> Path:
    """File of a profile: one of vqscale's own by name, or any YAML file by path.

    Raises:
        LookupError: there is none; the text lists the names there are.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    names = profile_names()
    if name in names:
        return PROFILES / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise LookupError(f"{hint}valid profiles: {', '.join(names)}, or the path of a YAML file")
