"""What the launcher asks of a Kubernetes cluster, by the official client; it is loaded when a cluster is."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from launcher.backends.kubernetes_check import INSTALL
from vqscale.errors import UserError

CONTAINER = "node"
"""Name of the replicated job, and of its container; Kubeflow's runtimes have the same."""
RUN_LABEL = "vqscale/run"
API_VERSIONS = {"JobSet": "jobset.x-k8s.io/v1alpha2", "TrainJob": "trainer.kubeflow.org/v1alpha1"}

_PLURALS = {"JobSet": "jobsets", "TrainJob": "trainjobs"}
_ENDS = {"Completed": True, "Complete": True, "Failed": False}
"""Condition → whether it is a success."""
_GONE = "somebody has deleted it"
_ANSWER_S = 30
_POLL_S = 0.5


def run_label(run: Path) -> str:
    """Value of the label by which all objects of a run are found; labels hold no paths."""
    return hashlib.sha256(str(run).encode()).hexdigest()[:20]


class UnreachableError(Exception):
    """The cluster does not answer now; it may later."""


@dataclass(frozen=True)
class Outcome:
    """How an object stands."""

    ended: bool = False
    success: bool = False
    words: str = ""
    """Reason and message of its last condition."""


@dataclass(frozen=True)
class Pod:
    """A pod of an object."""

    words: str
    """`Pending (Unschedulable: 0/3 nodes ...)`, `Pending (ImagePullBackOff)`, `Running`."""
    node: str
    """Empty while it has none."""
    disruption: str
    """Why the cluster has taken its place away, such as `EvictionByEvictionAPI`; empty where it has not."""


class Cluster:
    """One kind of object in one namespace.

    Args:
        context: context of the kubeconfig; None for the current one, or the pod's own account inside a cluster.
        namespace: namespace.
        kind: JobSet or TrainJob.

    Raises:
        UserError: the client is not installed, or nothing says where the cluster is.
    """

    def __init__(self, context: str | None, namespace: str, kind: str) -> None:
        try:
            from kubernetes import client
        except ImportError:
            raise UserError("its client is not installed", where="Kubernetes", mend=INSTALL) from None
        self._errors = client.exceptions.ApiException
        api = client.ApiClient(_configuration(context))
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        group, _, version = API_VERSIONS[kind].partition("/")
        self._namespace = namespace
        self._place = (group, version, namespace, _PLURALS[kind])

    def create(self, manifest: dict[str, Any], again: bool = False) -> None:
        """Make an object.

        Args:
            manifest: what.
            again: it was asked for before, and nobody knows whether that was heard: then it may be there.
        """
        with self._asking():
            try:
                self._objects.create_namespaced_custom_object(*self._place, manifest, _request_timeout=_ANSWER_S)
            except self._errors as error:
                if not (again and error.status == 409):
                    raise

    def outcome(self, name: str) -> Outcome:
        """How an object stands; one that is gone has failed."""
        with self._asking():
            try:
                found = self._objects.get_namespaced_custom_object(*self._place, name, _request_timeout=_ANSWER_S)
            except self._errors as error:
                if error.status == 404:
                    return Outcome(True, False, _GONE)
                raise
        return _outcome(cast(dict[str, Any], found))

    def pods(self, name: str) -> dict[str, Pod]:
        """Pods of an object by name. A TrainJob has a JobSet of the same name."""
        selector = f"jobset.sigs.k8s.io/jobset-name={name}"
        with self._asking():
            found = self._core.list_namespaced_pod(self._namespace, label_selector=selector, _request_timeout=_ANSWER_S)
        return {str(pod.metadata.name): _pod(pod) for pod in found.items if pod.metadata}

    def log(self, pod: str, lines: int) -> str:
        """The last lines of a pod's output; empty where there is none."""
        with self._asking():
            try:
                return str(
                    self._core.read_namespaced_pod_log(
                        pod, self._namespace, container=CONTAINER, tail_lines=lines, _request_timeout=_ANSWER_S
                    )
                )
            except self._errors as error:
                if error.status in (400, 404):  # it has not begun, or is gone
                    return ""
                raise

    def named(self, label: str) -> list[str]:
        """Names of a run's objects."""
        with self._asking():
            found = self._objects.list_namespaced_custom_object(
                *self._place, label_selector=f"{RUN_LABEL}={label}", _request_timeout=_ANSWER_S
            )
        return [one["metadata"]["name"] for one in cast(dict[str, Any], found)["items"]]

    def delete(self, name: str) -> None:
        """Ask for the end of an object and its pods; they get TERM, and KILL after their grace."""
        with self._asking():
            try:
                self._objects.delete_namespaced_custom_object(
                    *self._place, name, propagation_policy="Foreground", _request_timeout=_ANSWER_S
                )
            except self._errors as error:
                if error.status != 404:
                    raise

    def clear(self, label: str, limit_s: float) -> None:
        """Delete all objects of a run that have not ended, and wait until their pods are gone.

        Raises:
            UserError: the cluster refuses, or does not end them in `limit_s` seconds.
            UnreachableError: it does not answer.
        """
        alive = [name for name in self.named(label) if not self.outcome(name).ended]
        for name in alive:
            self.delete(name)
        self.wait_for_end(alive, limit_s)

    def wait_for_end(self, names: list[str], limit_s: float) -> None:
        """Wait until deleted objects and their pods are gone; raises as `clear`."""
        limit = time.monotonic() + limit_s
        while left := [name for name in names if not self._is_gone(name)]:
            if time.monotonic() > limit:
                raise UserError(f"{left[0]} does not end", where="Kubernetes", mend="see kubectl describe pods")
            time.sleep(_POLL_S)

    def _is_gone(self, name: str) -> bool:
        return self.outcome(name).words == _GONE and not self.pods(name)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Faults of the client as ours."""
        from urllib3.exceptions import HTTPError

        try:
            yield
        except self._errors as error:
            if error.status in (0, 429) or error.status >= 500:
                raise UnreachableError(f"{error.status} {error.reason}") from None
            raise UserError(_refusal(error), where="Kubernetes") from None
        except HTTPError as error:
            raise UnreachableError(str(error)) from None


def _configuration(context: str | None) -> Any:
    """Where the cluster is. The client itself would take localhost when nothing says so."""
    from kubernetes import client, config

    made = client.Configuration()
    made.retries = False
    try:
        if context is None and "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(client_configuration=made)
        else:
            # Named, since the client reads the variable once, when it is imported.
            place = os.environ.get("KUBECONFIG")
            config.load_kube_config(config_file=place, context=context, client_configuration=made)
    except config.ConfigException as error:
        raise UserError(
            f"nothing says where the cluster is ({' '.join(str(error).split())})",
            where="Kubernetes",
            mend="set KUBECONFIG, or kubernetes.context in the profile",
        ) from None
    return made


def _outcome(found: dict[str, Any]) -> Outcome:
    conditions = [one for one in found.get("status", {}).get("conditions", []) if one.get("status") == "True"]
    for one in conditions:
        if one["type"] in _ENDS:
            return Outcome(True, _ENDS[one["type"]], _words(one))
    return Outcome(words=_words(conditions[-1]) if conditions else "")


def _words(condition: dict[str, Any]) -> str:
    told = [condition.get("reason", ""), condition.get("message", "")]
    return ": ".join(word for word in told if word)


def _pod(pod: Any) -> Pod:
    status = pod.status
    taken = [one.reason for one in status.conditions or [] if one.type == "DisruptionTarget" and one.status == "True"]
    # Kubelets say `Evicted`, `NodeShutdown` and the like of pods that they end by themselves.
    disruption = next(filter(None, [*taken, status.reason]), "")
    node = (pod.spec.node_name if pod.spec else None) or ""
    return Pod(_pod_words(status) + (f" ({disruption})" if disruption else ""), node, disruption)


def _pod_words(status: Any) -> str:
    waiting = [one.state.waiting.reason for one in status.container_statuses or [] if one.state and one.state.waiting]
    refused = [
        f"{one.reason}: {one.message}" for one in status.conditions or [] if one.status == "False" and one.message
    ]
    why = waiting or refused if status.phase == "Pending" else []
    return f"{status.phase} ({why[0]})" if why else str(status.phase)


def _refusal(error: Any) -> str:
    """The server's own words, which stand in a `Status` object."""
    try:
        return f"{error.status}: {json.loads(error.body)['message']}"
    except (TypeError, ValueError, KeyError):
        return f"{error.status}: {error.reason}"
