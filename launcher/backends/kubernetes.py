"""Backend `kubernetes`: a JobSet for each stage, or a TrainJob of Kubeflow's; a pod a node, with torch's elastic agent.

The supervisor on the machine that submits runs `launcher.kube` for each stage, which makes the object and watches it.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster.profile import Profile
from cluster.rendezvous import agent_arguments
from launcher.backends.base import Job, StageCommand
from launcher.backends.kubernetes_check import check
from launcher.backends.kubernetes_manifest import (
    Expanded,
    Pods,
    Tree,
    dump,
    meeting,
    object_name,
    settings_of,
)
from launcher.backends.supervised import Supervised
from launcher.job import job_of
from launcher.kube import MARGIN_S
from launcher.kube_api import RUN_LABEL, Cluster, UnreachableError, run_label
from launcher.state import RunState
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError

FOR_CLIENT = ("KUBECONFIG", "KUBERNETES_*")
"""Variables that say where the cluster is."""


class KubernetesBackend(Supervised):
    """Runs stages in the cluster of the profile's section `kubernetes`."""

    def check(self, job: Job) -> None:
        """The run directory has to be where pods see it; the client has to be there, and know all fields.

        Raises:
            UserError: something of this is not so.
        """
        refuse_unseen(job.profile, job.run)
        cluster_of(job.profile)
        for command in self.render(job):
            check(yaml.safe_load(command.script))

    def stage_command(self, job: Job, stage: str, attempt: int) -> StageCommand:
        """`launcher.kube` with the manifest of the stage."""
        layout, kubernetes = job.layout, settings_of(job.profile)[0]
        context = ("--context", kubernetes.context) if kubernetes.context else ()
        return StageCommand(
            stage=stage,
            attempt=attempt,
            argv=(
                *(job.python, "-m", "launcher.kube", "--grace", str(job.profile.grace_s), *context),
                *("--", str(layout.manifest(stage))),
            ),
            variables=job.variables(stage, attempt),
            inherit=(*job.profile.inherit, *FOR_CLIENT),
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
            cluster_of(job.profile).clear(run_label(layout.root), job.profile.grace_s + MARGIN_S)
        except UnreachableError as error:
            mend = f"pods of the run may be left: kubectl get pods -l {RUN_LABEL}={run_label(layout.root)}"
            raise UserError(f"does not answer ({error})", where="Kubernetes", mend=mend) from None

    def _manifest(self, job: Job, stage: str, attempt: int) -> Tree:
        name = object_name(job.run, stage, attempt, job.task)
        # The last of several variables counts, as for other backends.
        environment = {variable.name: variable.value for variable in job.variables(stage, attempt)}
        return Pods(
            profile=job.profile,
            name=name,
            labels={"app.kubernetes.io/name": "vqscale", RUN_LABEL: run_label(job.run), "vqscale/stage": stage},
            nodes=job.places[stage].nodes,
            processes=job.processes_per_node(stage),
            command=self._command(job, stage, attempt, name),
            environment=environment,
            source=job.source,
        ).manifest()

    def _command(self, job: Job, stage: str, attempt: int, name: str) -> list[str]:
        """What a pod runs. The first one holds the store in which the agents meet."""
        kubernetes, container = settings_of(job.profile)
        endpoint, index = meeting(kubernetes, name)
        rendezvous = agent_arguments(
            rdzv_id=name,
            processes=job.processes_per_node(stage),
            max_restarts=job.resources(stage).max_restarts,
            nodes=job.places[stage].nodes,
            endpoint=endpoint,
            address=Expanded("$(POD_IP)"),
        )
        agent = self.agent(job, stage, attempt, rendezvous, container.python or job.python, tee=True)
        shell = f'PET_RDZV_CONF="is_host=$(({index} == 0))" exec "$@"'
        return ["sh", "-c", shell, "agent", *agent]


def refuse_unseen(profile: Profile, folder: Path) -> None:
    """A folder has to be where pods see it.

    Raises:
        UserError: it lies on no volume that they can write.
    """
    places = [one.path for one in settings_of(profile)[0].volumes if not one.read_only]
    if not any(folder.is_relative_to(place) for place in places):
        mend = f"choose --run, or VQSCALE_RUNS, below {' or '.join(places) or 'a volume that can be written'}"
        raise UserError("lies on no volume that the pods mount", where=str(folder), mend=mend)


def cluster_of(profile: Profile) -> Cluster:
    """The cluster of a profile.

    Raises:
        UserError: the client is not installed, or nothing says where the cluster is.
    """
    kubernetes = settings_of(profile)[0]
    return Cluster(kubernetes.context, kubernetes.namespace, kubernetes.kind)
