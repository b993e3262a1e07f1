"""Manifests of stages for the backend `kubernetes`: pure functions from a job to plain trees."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import yaml

from cluster.container import ContainerSettings
from cluster.kubernetes import KubernetesSettings, Toleration
from cluster.rendezvous import NODE
from launcher.backends.base import Job
from launcher.kube_api import CONTAINER

Tree = dict[str, Any]


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


def job_set(job: Job, stage: str, attempt: int, command: list[str], name: str, labels: Tree) -> Tree:
    """The spec of a JobSet: one replicated job of indexed pods."""
    kubernetes, container = settings_of(job)
    pod = {
        **_pod(job),
        "restartPolicy": "Never",
        **_unless_empty(priorityClassName=kubernetes.priority_class),
        "containers": [
            {
                "name": CONTAINER,
                "image": container.image,
                "workingDir": container.workdir or str(job.source),
                "command": command,
                "env": _environment(job, stage, attempt),
                **_unless_empty(envFrom=[{"secretRef": {"name": one}} for one in kubernetes.secrets]),
                "resources": _resources(kubernetes),
                "volumeMounts": _mounts(kubernetes),
            }
        ],
    }
    batch = {
        "parallelism": job.places[stage].nodes,
        "completions": job.places[stage].nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a lost pod ends the stage, which goes on from its checkpoint as a whole
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
        "failurePolicy": {"maxRestarts": 0},
        "ttlSecondsAfterFinished": kubernetes.keep_s,
        "replicatedJobs": [{"name": CONTAINER, "replicas": 1, "template": {"spec": batch}}],
    }


def train_job(job: Job, stage: str, attempt: int, command: list[str]) -> Tree:
    """The spec of a TrainJob: its trainer, and what its runtime's pods get besides."""
    kubernetes, container = settings_of(job)
    pod = {**_pod(job), "containers": [{"name": CONTAINER, "volumeMounts": _mounts(kubernetes)}]}
    patched = {"replicatedJobs": [{"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}]}
    # A TrainJob names no folder to start in: the agent finds the code by this.
    source = {"name": "PYTHONPATH", "value": escaped(container.workdir or str(job.source))}
    return {
        "runtimeRef": {"name": kubernetes.runtime},
        "trainer": {
            "image": container.image,
            "command": command,
            "env": [source, *_environment(job, stage, attempt)],
            "numNodes": job.places[stage].nodes,
            "numProcPerNode": job.processes_per_node(stage),
            "resourcesPerNode": _resources(kubernetes),
        },
        "runtimePatches": [{"manager": "vqscale/launcher", "trainingRuntimeSpec": {"template": {"spec": patched}}}],
    }


def _pod(job: Job) -> Tree:
    """What both kinds say of a pod."""
    kubernetes, _ = settings_of(job)
    volumes: list[Tree] = [
        {"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": one.claim, "readOnly": one.read_only}}
        for number, one in enumerate(kubernetes.volumes)
    ]
    # The default of 64 MB is too little for what processes share.
    volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    return {
        "terminationGracePeriodSeconds": job.profile.grace_s,
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


def _environment(job: Job, stage: str, attempt: int) -> list[Tree]:
    """Variables of the stage; of the shell that submits nothing reaches the pods."""
    own = {"POD_IP": "status.podIP", NODE: "spec.nodeName"}
    given = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in own.items()]
    # The last of several counts, as for other backends.
    values = {variable.name: variable.value for variable in job.variables(stage, attempt)}
    return [*given, *({"name": name, "value": escaped(value)} for name, value in values.items())]


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


def settings_of(job: Job) -> tuple[KubernetesSettings, ContainerSettings]:
    """The two sections of the profile.

    Raises:
        ValueError: one is not there; a profile of this backend is never so.
    """
    kubernetes, container = job.profile.kubernetes, job.profile.container
    if kubernetes is None or container is None:
        raise ValueError(f"profile {job.profile.name} has no sections `kubernetes` and `container`")
    return kubernetes, container
