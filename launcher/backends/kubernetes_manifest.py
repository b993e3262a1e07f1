"""Manifests for Kubernetes: pure functions from what pods are to run to plain trees."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.container import ContainerSettings
from cluster.kubernetes import KubernetesSettings, Toleration
from cluster.profile import Profile
from cluster.rendezvous import NODE
from launcher.kube_api import API_VERSIONS, CONTAINER

Tree = dict[str, Any]


# Variables that Kubeflow's runtime gives to pods.
_OF_KUBEFLOW = "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"


class Expanded(str):
    """A word with `$(NAME)` in it, for which the cluster puts the pod's variable. In other words `$` is escaped."""


def object_name(run: Path, stage: str, attempt: int, task: int | None = None) -> str:
    """At most 48 characters: those of a pod's host name are 63, and `-node-0-NUMBER` is put behind."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:16].strip("-") or "run"
    mark = zlib.crc32(f"{run}-{stage}-{attempt}-{task}".encode())
    return f"vq-{slug}-{stage}-{attempt}-{mark:08x}"


def dump(tree: Tree) -> str:
    """A manifest as YAML."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


@dataclass(frozen=True)
class Pods:
    """Pods that are alike, which run one command."""

    profile: Profile
    name: str
    """Of their object."""
    labels: Mapping[str, str]
    nodes: int
    """How many."""
    processes: int
    """In each of them."""
    command: Sequence[str]
    environment: Mapping[str, str]
    source: Path
    """Folder of the code, where the image does not have it elsewhere."""

    @property
    def settings(self) -> tuple[KubernetesSettings, ContainerSettings]:
        """The two sections of the profile."""
        return settings_of(self.profile)

    @property
    def directory(self) -> str:
        """Where the command starts."""
        return self.settings[1].workdir or str(self.source)

    def manifest(self) -> Tree:
        """The object that makes them: a JobSet, or a TrainJob."""
        kubernetes, _ = self.settings
        queue = {"kueue.x-k8s.io/queue-name": kubernetes.queue} if kubernetes.queue else {}
        return {
            "apiVersion": API_VERSIONS[kubernetes.kind],
            "kind": kubernetes.kind,
            "metadata": {
                "name": self.name,
                "namespace": kubernetes.namespace,
                "labels": {**self.labels, **queue},
            },
            "spec": (_job_set if kubernetes.kind == "JobSet" else _train_job)(self),
        }


def meeting(kubernetes: KubernetesSettings, name: str) -> tuple[str, str]:
    """Where the agents of an object meet, and the variable with a pod's number."""
    if kubernetes.kind == "TrainJob":
        return Expanded(_OF_KUBEFLOW), "PET_NODE_RANK"
    # The headless service that the JobSet makes gives its pods names.
    return f"{name}-{CONTAINER}-0-0.{name}:{kubernetes.rendezvous_port}", "JOB_COMPLETION_INDEX"


def _job_set(pods: Pods) -> Tree:
    """The spec of a JobSet: one replicated job of indexed pods."""
    kubernetes, container = pods.settings
    pod = {
        **_pod(pods),
        "restartPolicy": "Never",
        **_unless_empty(priorityClassName=kubernetes.priority_class),
        "containers": [
            {
                "name": CONTAINER,
                "image": container.image,
                "workingDir": pods.directory,
                "command": list(map(escaped, pods.command)),
                "env": _environment(pods),
                **_unless_empty(envFrom=[{"secretRef": {"name": one}} for one in kubernetes.secrets]),
                "resources": _resources(kubernetes),
                "volumeMounts": _mounts(kubernetes),
            }
        ],
    }
    batch = {
        "parallelism": pods.nodes,
        "completions": pods.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a lost pod ends the stage, which goes on from its checkpoint as a whole
        "template": {"metadata": {"labels": dict(pods.labels)}, "spec": pod},
    }
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": pods.name},
        "failurePolicy": {"maxRestarts": 0},
        "ttlSecondsAfterFinished": kubernetes.keep_s,
        "replicatedJobs": [{"name": CONTAINER, "replicas": 1, "template": {"spec": batch}}],
    }


def _train_job(pods: Pods) -> Tree:
    """The spec of a TrainJob: its trainer, and what its runtime's pods get besides."""
    kubernetes, container = pods.settings
    pod = {**_pod(pods), "containers": [{"name": CONTAINER, "volumeMounts": _mounts(kubernetes)}]}
    patched = {"replicatedJobs": [{"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}]}
    # A TrainJob names no folder to start in: the agent finds the code by this.
    source = {"name": "PYTHONPATH", "value": escaped(pods.directory)}
    return {
        "runtimeRef": {"name": kubernetes.runtime},
        "trainer": {
            "image": container.image,
            "command": list(map(escaped, pods.command)),
            "env": [source, *_environment(pods)],
            "numNodes": pods.nodes,
            "numProcPerNode": pods.processes,
            "resourcesPerNode": _resources(kubernetes),
        },
        "runtimePatches": [{"manager": "vqscale/launcher", "trainingRuntimeSpec": {"template": {"spec": patched}}}],
    }


def _pod(pods: Pods) -> Tree:
    """What both kinds say of a pod."""
    kubernetes, _ = pods.settings
    volumes: list[Tree] = [
        {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": one.claim, "readOnly": one.read_only}}
        for number, one in enumerate(kubernetes.volumes)
    ]
    # The default of 64 MB is too little for what processes share.
    volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    return {
        "terminationGracePeriodSeconds": pods.profile.grace_s,
        **_unless_empty(
            serviceAccountName=kubernetes.service_account,
            nodeSelector=dict(kubernetes.node_selector),
            tolerations=[_toleration(one) for one in kubernetes.tolerations],
            imagePullSecrets=[{"name": one} for one in kubernetes.pull_secrets],
            securityContext=_identity(kubernetes),
            affinity=_affinity(kubernetes),
        ),
        "volumes": volumes,
    }


def _identity(kubernetes: KubernetesSettings) -> Tree:
    if kubernetes.run_as is None:
        return {}
    user, group = map(int, kubernetes.run_as.split(":"))
    return {"runAsUser": user, "runAsGroup": group, "fsGroup": group}


def _affinity(kubernetes: KubernetesSettings) -> Tree:
    """Away from some nodes: always, or where others are free."""

    def other_than(names: tuple[str, ...]) -> Tree:
        return {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(names)}]}

    never, seldom = kubernetes.exclude, kubernetes.avoid
    required = {"nodeSelectorTerms": [other_than(never)]} if never else {}
    preferred = [{"weight": 100, "preference": other_than(seldom)}] if seldom else []
    found = _unless_empty(
        requiredDuringSchedulingIgnoredDuringExecution=required,
        preferredDuringSchedulingIgnoredDuringExecution=preferred,
    )
    return {"nodeAffinity": found} if found else {}


def _mounts(kubernetes: KubernetesSettings) -> list[Tree]:
    mounts: list[Tree] = [
        {"name": f"volume-{number}", "mountPath": one.path, "readOnly": one.read_only}
        for number, one in enumerate(kubernetes.volumes)
    ]
    return [*mounts, {"name": "shared-memory", "mountPath": "/dev/shm"}]


def _environment(pods: Pods) -> list[Tree]:
    """Variables of a pod; of the shell that submits nothing reaches the pods."""
    own = {"POD_IP": "status.podIP", NODE: "spec.nodeName"}
    given = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in own.items()]
    return [*given, *({"name": name, "value": escaped(value)} for name, value in pods.environment.items())]


def _resources(kubernetes: KubernetesSettings) -> Tree:
    limits = {
        "cpu": str(kubernetes.cpus_per_node),
        **_unless_empty(memory=f"{kubernetes.memory_gb}Gi" if kubernetes.memory_gb else ""),
        **({kubernetes.gpu_resource: str(kubernetes.gpus_per_node)} if kubernetes.gpus_per_node else {}),
    }
    return {"requests": dict(limits), "limits": limits}


def _toleration(one: Toleration) -> Tree:
    operator = "Exists" if one.value is None else "Equal"
    return {"key": one.key, "operator": operator, **_unless_empty(value=one.value, effect=one.effect)}


def _unless_empty(**values: Any) -> Tree:
    return {name: value for name, value in values.items() if value}


def escaped(word: str) -> str:
    """A word of a command, or a variable's value, that reaches the pod as it is."""
    return str(word) if isinstance(word, Expanded) else word.replace("$", "$$")


def settings_of(profile: Profile) -> tuple[KubernetesSettings, ContainerSettings]:
    """The two sections of the profile.

    Raises:
        ValueError: one is not there; a profile of this backend is never so.
    """
    kubernetes, container = profile.kubernetes, profile.container
    if kubernetes is None or container is None:
        raise ValueError(f"profile {profile.name} has no sections `kubernetes` and `container`")
    return kubernetes, container
