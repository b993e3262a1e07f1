"""What a profile says of a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.nodes import Persistence, spread
from cluster.section import Section

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""A name of an object of Kubernetes."""
_LABEL = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
Key = Annotated[str, Field(pattern=rf"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_LABEL}$")]
"""Key of a label, a taint or a resource, such as `nvidia.com/gpu`."""
Label = Annotated[str, Field(pattern=rf"^({_LABEL})?$")]
"""Value of a label or a taint."""
Folder = Annotated[str, Field(pattern=r"^/[^\x00-\x1f\x7f:]+$")]
"""An absolute path that is mounted to."""


class Volume(Section):
    """A claim of a persistent volume, which all pods mount; it has to allow `ReadWriteMany` (or many readers)."""

    claim: Name
    """Name of the PersistentVolumeClaim."""
    path: Folder
    """Where it is mounted: the same path as on the machine that submits."""
    read_only: bool = False
    """Whether stages may only read it."""


class Toleration(Section):
    """A taint of nodes that the pods put up with."""

    key: Key
    """Key of the taint."""
    value: Label | None = None
    """Value of the taint; any when it is left out."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; all when it is left out."""


class KubernetesSettings(Persistence):
    """What is asked of Kubernetes for each stage: a pod a node, in which torch's elastic agent starts the processes."""

    kind: Literal["JobSet", "TrainJob"] = "JobSet"
    """Object that is made for a stage: a JobSet, or a TrainJob of Kubeflow's."""
    namespace: Name = "default"
    """Namespace of all objects."""
    context: Annotated[str, Field(min_length=1)] | None = None
    """Context of the kubeconfig; its current one when it is left out."""
    nodes: Annotated[int, Field(ge=1)] | None = None
    """Pods that the processes of a stage are shared by. Left out: as few as have a GPU for each process, or one."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of each pod."""
    gpu_resource: Key = "nvidia.com/gpu"
    """What the cluster calls a GPU."""
    cpus_per_node: Annotated[int, Field(ge=1)]
    """CPU cores of each pod; its processes share them."""
    memory_gb: Annotated[int, Field(ge=1)] | None = None
    """Memory of each pod in GiB; no request when it is left out."""
    node_selector: dict[Key, Label] = Field({})
    """Labels that the nodes have to carry."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that the pods put up with."""
    exclude: tuple[Name, ...] = ()
    """Nodes that are not used, by their label `kubernetes.io/hostname`."""
    avoid: tuple[Name, ...] = ()
    """Nodes that are used only where no others are free. Those at fault in an earlier attempt are added to them."""
    volumes: Annotated[tuple[Volume, ...], Field(min_length=1)]
    """Claims of volumes. The run directory has to lie on one of them, and so has what the image lacks."""
    service_account: Name | None = None
    """Service account of the pods."""
    run_as: Annotated[str, Field(pattern=r"^[0-9]{1,10}:[0-9]{1,10}$")] | None = None
    """Numbers of the user and the group that stages run as, `1000:1000`: those who own the files on the volumes. The
    image's own when it is left out."""
    priority_class: Name | None = None
    """PriorityClass of the pods (JobSet only)."""
    queue: Name | None = None
    """Local queue of Kueue, which then decides when the pods start."""
    secrets: tuple[Name, ...] = ()
    """Secrets whose keys become variables of the stages, such as those of an object store (JobSet only)."""
    pull_secrets: tuple[Name, ...] = ()
    """Secrets for pulling the image."""
    runtime: Name = "torch-distributed"
    """ClusterTrainingRuntime that a TrainJob refers to."""
    rendezvous_port: Annotated[int, Field(ge=1024, le=65535)] = 29400
    """Port of the first pod at which the agents meet (JobSet only); pods have addresses of their own."""
    keep_s: Annotated[int, Field(ge=0)] = 86400
    """Seconds that a finished JobSet, and its pods' logs, can be looked at before the cluster removes them."""

    @model_validator(mode="after")
    def _has_a_place(self) -> KubernetesSettings:
        asked = {"priority_class": self.priority_class, "secrets": self.secrets}
        given = [name for name, value in asked.items() if value]
        if self.kind == "TrainJob" and given:
            raise ValueError(f"{given[0]}: a TrainJob has no place for it; use a JobSet, or put it into the runtime")
        return self

    @property
    def cores_per_node(self) -> int:
        """CPU cores of each pod."""
        return self.cpus_per_node

    def without(self, names: Iterable[str]) -> KubernetesSettings:
        """The same, avoiding some nodes: how many others there are, only the cluster knows."""
        return self.model_copy(update={"avoid": (*self.avoid, *names)})

    def can_spare(self, names: Iterable[str], processes: int) -> bool:
        """Whether some nodes may be left out; they are only avoided."""
        return True

    def spread(self, processes: int) -> int:
        """Pods for so many processes.

        Raises:
            ValueError: they cannot be shared evenly.
        """
        return spread(processes, self.nodes, self.gpus_per_node)
