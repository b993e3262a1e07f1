"""What a profile says of a Slurm cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cluster.nodes import Persistence, spread
from cluster.section import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,@+-]*$")]
"""A name of Slurm's, or several with commas between them."""
Nodes = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,-]*(\[[0-9,-]+\][A-Za-z0-9_.-]*)?$")]
"""A node, or a range such as `gpu[01-04]`."""
# Printable ASCII without quotes, backslash and #, which mean something in a line of #SBATCH; no blanks.
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[!$-&(-\[\]-~]+)?$")]
"""One more option of sbatch, such as `--constraint=a100`."""
Line = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0a-\x1f\x7f]+$")]
"""A line of shell."""

OURS = (
    "account", "array", "chdir", "cpus-per-task", "dependency", "error", "exclude", "export", "export-file", "gpus",
    "gpus-per-node", "gpus-per-task", "input", "job-name", "kill-on-invalid-dep", "mem", "no-requeue", "nodes",
    "ntasks", "ntasks-per-node", "open-mode", "output", "parsable", "partition", "qos", "requeue", "signal",
    "test-only", "time", "wait", "wrap",
)  # fmt: skip
"""Options of sbatch that the launcher decides."""


class StageSlurm(Section):
    """What is asked for one stage where that differs from the others; what is left out is as for all."""

    partition: Name | None = None
    """Partition of the stage's jobs."""
    qos: Name | None = None
    """Quality of service of the stage's jobs."""
    nodes: Annotated[int, Field(ge=1)] | None = None
    """Nodes that the processes of the stage, or of each of its tasks, are shared by."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs of each node."""
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    """CPU cores of each node."""
    memory_gb: Annotated[int, Field(ge=0)] | None = None
    """Memory of each node in GiB; 0 is all of it."""
    time_min: Annotated[int, Field(ge=1)] | None = None
    """Longest time in minutes, before the stage is requeued."""
    at_most: Annotated[int, Field(ge=1)] | None = None
    """Tasks of an array that run at the same time; no limit when it is left out."""


class SlurmSettings(Persistence):
    """What is asked of Slurm for each stage: one task a node, in which torch's elastic agent starts the processes."""

    partition: Name | None = None
    """Partition; the cluster's default when it is left out."""
    account: Name | None = None
    """Account that is charged; the user's default when it is left out."""
    qos: Name | None = None
    """Quality of service; the default when it is left out."""
    nodes: Annotated[int, Field(ge=1)] | None = None
    """Nodes that the processes of a stage are shared by. Left out: as few as have a GPU for each process, or one."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of each node."""
    cpus_per_task: Annotated[int, Field(ge=1)]
    """CPU cores of each node."""
    memory_gb: Annotated[int, Field(ge=0)] | None = None
    """Memory of each node in GiB; 0 is all of it; the partition's default when it is left out."""
    time_min: Annotated[int, Field(ge=1)] | None = None
    """Longest time of a stage in minutes, before it is requeued; the partition's default when it is left out."""
    exclude: tuple[Nodes, ...] = ()
    """Nodes that are not used."""
    options: tuple[Option, ...] = ()
    """Further options of sbatch, such as `--constraint=a100`."""
    setup: tuple[Line, ...] = ()
    """Lines of shell that run first in each job, such as `module load cuda/12.4`. What they export reaches the
    stages; variables of `environment` are set after them."""
    signal: Literal["USR2", "USR1"] = "USR2"
    """Signal by which Slurm announces the end of the time, or a preemption, to the job's first node. Where a cluster
    sends one of its own, that; the stage's processes get USR2 in any case, since NCCL uses USR1."""
    lead_s: Annotated[int, Field(ge=15)] = 120
    """Seconds before the end of the time (or a preemption) at which Slurm sends it, upon which the stage saves.
    Slurm sends it up to a minute early."""
    stages: dict[str, StageSlurm] = Field({})
    """Stages for which something else is asked, such as `extract: {partition: cpu, gpus_per_node: 0}`."""

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if option[2:].partition("=")[0] in OURS:
                raise ValueError(f"{option}: this option is set by vqscale; use the settings of `slurm` in the profile")
        return options

    def of(self, stage: str) -> SlurmSettings:
        """What is asked for one stage: its own settings above the common ones."""
        own = self.stages.get(stage, StageSlurm())
        return self.model_copy(
            update={name: value for name, value in own if value is not None and name in SlurmSettings.model_fields}
        )

    def at_most(self, stage: str) -> int | None:
        """Tasks of a stage's array that may run at the same time."""
        return self.stages.get(stage, StageSlurm()).at_most

    @property
    def cores_per_node(self) -> int:
        """CPU cores of each node."""
        return self.cpus_per_task

    def spread(self, processes: int) -> int:
        """Nodes for so many processes.

        Raises:
            ValueError: they cannot be shared evenly.
        """
        return spread(processes, self.nodes, self.gpus_per_node)
