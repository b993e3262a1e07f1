"""Backend `kubernetes`: a JobSet for each stage, or a TrainJob of Kubeflow's; a pod a node, with torch's elastic agent.

The supervisor on the machine that submits runs `launcher.kube` for each stage, which makes the object and watches it.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import yaml

from cluster.container import ContainerSettings
from cluster.kubernetes import KubernetesSettings, Toleration
from cluster.rendezvous import agent_arguments
from launcher.backends.base import Job, StageCommand
from launcher.backends.kubernetes_check import check
from launcher.backends.supervised import Supervised
from launcher.job import job_of
from launcher.kube import MARGIN_S
from launcher.kube_api import API_VERSIONS, CONTAINER, RUN_LABEL, Cluster, UnreachableError, run_label
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError

_FOR_CLIENT = ("KUBECONFIG", "KUBERNETES_*")
# Variables that Kubeflow's runtime gives to pods.
_OF_KUBEFLOW = "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"
Tree = dict[str, Any]


class Expanded(str):
    """A word with `$(NAME)` in it, for which the cluster puts the pod's variable. In other words `$` is escaped."""


class KubernetesBackend(Supervised):
    """Runs stages in the cluster of the profile's section `kubernetes`."""

    def check(self, job: Job) -> None:
        """The run directory has to be where pods see it; the client has to be there, and know all fields.

        Raises:
            UserError: something of this is not so.
        """
        _refuse_unseen(job)
        _cluster(job)
        for command in self.render(job):
            check(yaml.safe_load(command.script))

    def stage_command(self, job: Job, stage: str, attempt: int) -> StageCommand:
        """`launcher.kube` with the manifest of the stage."""
        layout, kubernetes = job.layout, _settings(job)[0]
        context = ("--context", kubernetes.context) if kubernetes.context else ()
        return StageCommand(
            stage=stage,
            attempt=attempt,
            argv=(
                *(job.python, "-m", "launcher.kube", "--grace", str(job.profile.grace_s), *context),
                *("--", str(layout.manifest(stage))),
            ),
            variables=job.variables(stage, attempt),
            inherit=(*job.profile.inherit, *_FOR_CLIENT),
            directory=job.source,
            log=layout.attempt(stage, attempt) / "agent.log",
            grace_s=job.profile.grace_s + MARGIN_S,
            script=dump(self._manifest(job, stage, attempt)),
        )

    def clear(self, layout: RunLayout) -> None:
        """Delete what a supervisor that was killed has left in the cluster.

        Raises:
            UserError: the cluster cannot be asked.
        """
        job = job_of(layout, tuple(RunState.read(layout).stages))
        try:
            _cluster(job).clear(run_label(layout.root), job.profile.grace_s + MARGIN_S)
        except UnreachableError as error:
            mend = f"pods of the run may be left: kubectl get pods -l {RUN_LABEL}={run_label(layout.root)}"
            raise UserError(f"does not answer ({error})", where="Kubernetes", mend=mend) from None

    def _manifest(self, job: Job, stage: str, attempt: int) -> Tree:
        kubernetes, _ = _settings(job)
        name = object_name(job.run, stage, attempt, job.task)
        labels = {"app.kubernetes.io/name": "vqscale", RUN_LABEL: run_label(job.run), "vqscale/stage": stage}
        queue = {"kueue.x-k8s.io/queue-name": kubernetes.queue} if kubernetes.queue else {}
        if kubernetes.kind == "JobSet":
            # The headless service that the JobSet makes gives its pods names.
            endpoint = f"{name}-{CONTAINER}-0-0.{name}:{kubernetes.rendezvous_port}"
            command = self._command(job, stage, attempt, endpoint, "JOB_COMPLETION_INDEX")
            spec = _job_set(job, stage, attempt, command, name, labels)
        else:
            command = self._command(job, stage, attempt, Expanded(_OF_KUBEFLOW), "PET_NODE_RANK")
            spec = _train_job(job, stage, attempt, command)
        return {
            "apiVersion": API_VERSIONS[kubernetes.kind],
            "kind": kubernetes.kind,
            "metadata": {"name": name, "namespace": kubernetes.namespace, "labels": {**labels, **queue}},
            "spec": spec,
        }

    def _command(self, job: Job, stage: str, attempt: int, endpoint: str, index: str) -> list[str]:
        """What a pod runs. The one whose variable `index` is 0 holds the store in which the agents meet."""
        rendezvous = agent_arguments(
            rdzv_id=object_name(job.run, stage, attempt, job.task),
            processes=job.processes_per_node(stage),
            max_restarts=job.resources(stage).max_restarts,
            nodes=job.places[stage].nodes,
            endpoint=endpoint,
            address=Expanded("$(POD_IP)"),
        )
        python = _settings(job)[1].python or job.python
        agent = self.agent(job, stage, attempt, rendezvous, python, tee=True)
        shell = f'PET_RDZV_CONF="is_host=$(({index} == 0))" exec "$@"'
        return list(map(_escaped, ("sh", "-c", shell, "agent", *agent)))


def object_name(run: Path, stage: str, attempt: int, task: int | None = None) -> str:
    """At most 48 characters: those of a pod's host name are 63, and `-node-0-NUMBER` is put behind."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-")[:16].strip("-") or "run"
    mark = zlib.crc32(f"{run}-{stage}-{attempt}-{task}".encode())
    return f"vq-{slug}-{stage}-{attempt}-{mark:08x}"


def dump(tree: Tree) -> str:
    """A manifest as YAML."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def _job_set(job: Job, stage: str, attempt: int, command: list[str], name: str, labels: Tree) -> Tree:
    kubernetes, container = _settings(job)
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


def _train_job(job: Job, stage: str, attempt: int, command: list[str]) -> Tree:
    kubernetes, container = _settings(job)
    pod = {**_pod(job), "containers": [{"name": CONTAINER, "volumeMounts": _mounts(kubernetes)}]}
    job_set = {"replicatedJobs": [{"name": CONTAINER, "template": {"spec": {"template": {"spec": pod}}}}]}
    # A TrainJob names no folder to start in: the agent finds the code by this.
    source = {"name": "PYTHONPATH", "value": _escaped(container.workdir or str(job.source))}
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
        "runtimePatches": [{"manager": "vqscale/launcher", "trainingRuntimeSpec": {"template": {"spec": job_set}}}],
    }


def _pod(job: Job) -> Tree:
    """What both kinds say of a pod."""
    kubernetes, _ = _settings(job)
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
        ),
        "volumes": volumes,
    }


def _mounts(kubernetes: KubernetesSettings) -> list[Tree]:
    mounts: list[Tree] = [
        {"name": f"volume-{number}", "mountPath": one.path, "readOnly": one.read_only}
        for number, one in enumerate(kubernetes.volumes)
    ]
    return [*mounts, {"name": "shared-memory", "mountPath": "/dev/shm"}]


def _environment(job: Job, stage: str, attempt: int) -> list[Tree]:
    """Variables of the stage; of the shell that submits nothing reaches the pods."""
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    # The last of several counts, as for other backends.
    values = {variable.name: variable.value for variable in job.variables(stage, attempt)}
    return [address, *({"name": name, "value": _escaped(value)} for name, value in values.items())]


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


def _escaped(word: str) -> str:
    return str(word) if isinstance(word, Expanded) else word.replace("$", "$$")


def _refuse_unseen(job: Job) -> None:
    places = [one.path for one in _settings(job)[0].volumes if not one.read_only]
    if not any(job.run.is_relative_to(place) for place in places):
        mend = f"choose --run, or VQSCALE_RUNS, below {' or '.join(places) or 'a volume that can be written'}"
        raise UserError("lies on no volume that the pods mount", where=str(job.run), mend=mend)


def _cluster(job: Job) -> Cluster:
    kubernetes = _settings(job)[0]
    return Cluster(kubernetes.context, kubernetes.namespace, kubernetes.kind)


def _settings(job: Job) -> tuple[KubernetesSettings, ContainerSettings]:
    kubernetes, container = job.profile.kubernetes, job.profile.container
    if kubernetes is None or container is None:
        raise ValueError(f"profile {job.profile.name} has no sections `kubernetes` and `container`")
    return kubernetes, container
