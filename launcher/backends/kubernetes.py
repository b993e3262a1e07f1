"""Backend `kubernetes`: a JobSet for each stage, or a TrainJob of Kubeflow's; a pod a node, with torch's elastic agent.

The supervisor on the machine that submits runs `launcher.kube` for each stage, which makes the object and watches it.
"""

from __future__ import annotations

import yaml

from cluster.rendezvous import agent_arguments
from launcher.backends.base import Job, StageCommand
from launcher.backends.kubernetes_check import check
from launcher.backends.kubernetes_manifest import (
    Expanded,
    Tree,
    dump,
    escaped,
    job_set,
    object_name,
    settings_of,
    train_job,
)
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
        layout, kubernetes = job.layout, settings_of(job)[0]
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
        kubernetes, _ = settings_of(job)
        name = object_name(job.run, stage, attempt, job.task)
        labels = {"app.kubernetes.io/name": "vqscale", RUN_LABEL: run_label(job.run), "vqscale/stage": stage}
        queue = {"kueue.x-k8s.io/queue-name": kubernetes.queue} if kubernetes.queue else {}
        if kubernetes.kind == "JobSet":
            # The headless service that the JobSet makes gives its pods names.
            endpoint = f"{name}-{CONTAINER}-0-0.{name}:{kubernetes.rendezvous_port}"
            command = self._command(job, stage, attempt, endpoint, "JOB_COMPLETION_INDEX")
            spec = job_set(job, stage, attempt, command, name, labels)
        else:
            command = self._command(job, stage, attempt, Expanded(_OF_KUBEFLOW), "PET_NODE_RANK")
            spec = train_job(job, stage, attempt, command)
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
        python = settings_of(job)[1].python or job.python
        agent = self.agent(job, stage, attempt, rendezvous, python, tee=True)
        shell = f'PET_RDZV_CONF="is_host=$(({index} == 0))" exec "$@"'
        return list(map(escaped, ("sh", "-c", shell, "agent", *agent)))


def _refuse_unseen(job: Job) -> None:
    places = [one.path for one in settings_of(job)[0].volumes if not one.read_only]
    if not any(job.run.is_relative_to(place) for place in places):
        mend = f"choose --run, or VQSCALE_RUNS, below {' or '.join(places) or 'a volume that can be written'}"
        raise UserError("lies on no volume that the pods mount", where=str(job.run), mend=mend)


def _cluster(job: Job) -> Cluster:
    kubernetes = settings_of(job)[0]
    return Cluster(kubernetes.context, kubernetes.namespace, kubernetes.kind)
