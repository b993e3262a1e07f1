"""A small API server for tests: objects of JobSet and Kubeflow, and pods that are processes of this machine.

Only what the launcher asks for, over real HTTP. It knows neither scheduling nor schemas.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from cluster.devslurm import _free_ports
from launcher.backends.base import STAGE_TAG

Tree = dict[str, Any]


@dataclass
class Pod:
    """A pod: its process, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    node: str
    evicted: bool = False

    def facts(self) -> Tree:
        code = self.process.poll()
        phase = "Running" if code is None else "Failed" if code else "Succeeded"
        why = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        status = {"phase": phase, "conditions": [why] if self.evicted else []}
        return {"metadata": {"name": self.name}, "spec": {"nodeName": self.node, "containers": []}, "status": status}


@dataclass
class Cluster:
    """All that the server keeps.

    Args:
        folder: for the pods' output.
    """

    folder: Path
    objects: dict[str, Tree] = field(default_factory=dict)
    pods: dict[str, list[Pod]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Method and path of each request."""
    faults: list[int] = field(default_factory=list)
    """Status codes with which the next requests are answered."""
    unheard: int = 0
    """So many of the next objects are made, but the answer says that it took too long."""
    refuse: str = ""
    """Why objects are not made."""
    port: int = field(default_factory=lambda: _free_ports(1)[0])
    """Where the agents of a TrainJob meet."""

    def create(self, made: Tree) -> None:
        name = made["metadata"]["name"]
        if made["kind"] == "TrainJob":
            container, number = made["spec"]["trainer"], made["spec"]["trainer"]["numNodes"]
        else:
            job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
            container, number = job["template"]["spec"]["containers"][0], job["completions"]
        self.objects[name] = made
        self.pods[name] = [self._start(f"{name}-node-0-{n}", container, n) for n in range(number)]

    def _start(self, name: str, container: Tree, index: int) -> Pod:
        facts = {"status.podIP": "127.0.0.1", "spec.nodeName": f"machine-{index}"}
        given = {"JOB_COMPLETION_INDEX": str(index), "PATH": os.environ["PATH"]}
        given |= {"PET_NODE_RANK": str(index), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(self.port)}
        for one in container["env"]:
            told = facts[one["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in one else one["value"]
            given[one["name"]] = expanded(told, given)
        given.pop(STAGE_TAG, None)  # this machine does not find processes of another one
        command = [expanded(word, given) for word in container["command"]]
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=given, cwd=container.get("workingDir", "/"), stdout=file, stderr=file
            )
        return Pod(name, process, log, f"machine-{index}")

    def read(self, name: str) -> Tree | None:
        """An object with its condition; one that is being deleted is gone when its pods have ended."""
        found = self.objects.get(name)
        if found is None:
            return None
        codes = [pod.process.poll() for pod in self.pods[name]]
        ended = all(code is not None for code in codes)
        if found["metadata"].get("deletionTimestamp") and ended:
            del self.objects[name], self.pods[name]
            return None
        failed = any(codes)
        if failed:  # as with maxRestarts: 0 and backoffLimit: 0
            self.end(name)
        words = {"type": "Failed" if failed else "Completed", "status": "True", "reason": "AJobEnded", "message": "x"}
        return {**found, "status": {"conditions": [words] if ended or failed else []}}

    def delete(self, name: str) -> None:
        self.objects[name]["metadata"]["deletionTimestamp"] = "now"
        self.end(name)

    def evict(self, pod: Pod, number: int) -> None:
        """As a drained node, or a pod of higher priority, does; `number` is the signal."""
        pod.evicted = True
        pod.process.send_signal(number)

    def end(self, name: str) -> None:
        for pod in self.pods[name]:
            if pod.process.poll() is None:
                pod.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        for pods in self.pods.values():
            for pod in pods:
                pod.process.kill()
                pod.process.wait()


def expanded(text: str, given: dict[str, str]) -> str:
    """As the kubelet does: `$(NAME)` is a variable, `$$` a dollar."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else given.get(m[1], m[0]), text)


class Handler(BaseHTTPRequestHandler):
    """Answers the client."""

    cluster: Cluster

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._is_broken():
            return
        if self.cluster.refuse:
            self._answer(403, {"kind": "Status", "message": self.cluster.refuse})
            return
        if body["metadata"]["name"] in self.cluster.objects:
            self._answer(409, {"kind": "Status", "message": "already exists"})
            return
        self.cluster.create(body)
        self.cluster.unheard -= (unheard := self.cluster.unheard > 0)
        self._answer(*((504, {"kind": "Status", "message": "timeout"}) if unheard else (201, body)))

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = urlsplit(self.path).path.rpartition("/")[2]
        if self._is_broken():
            return
        if name in self.cluster.objects:
            self.cluster.delete(name)
        self._answer(200, {"kind": "Status", "status": "Success"})

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        parts = url.path.strip("/").split("/")
        if self._is_broken():
            return
        if parts[-1] == "log":
            self._answer(200, self._log(parts[-2]))
        elif parts[-1] == "pods":
            name = query["labelSelector"][0].partition("=")[2]
            pods = [pod.facts() for pod in self.cluster.pods.get(name, [])]
            self._answer(200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods})
        elif parts[-1] in ("jobsets", "trainjobs"):
            label = query["labelSelector"][0].partition("=")[2]
            found = [one for one in self.cluster.objects.values() if label in one["metadata"]["labels"].values()]
            self._answer(200, {"items": found})
        else:
            found_one = self.cluster.read(parts[-1])
            self._answer(200 if found_one else 404, found_one or {"kind": "Status", "message": "not found"})

    def _log(self, pod: str) -> str:
        return next(one.log.read_text() for pods in self.cluster.pods.values() for one in pods if one.name == pod)

    def _is_broken(self) -> bool:
        self.cluster.asked.append(f"{self.command} {urlsplit(self.path).path}")
        if self.cluster.faults:
            self._answer(self.cluster.faults.pop(0), {"kind": "Status", "message": "try again"})
            return True
        return False

    def _answer(self, code: int, body: Tree | str) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def server(folder: Path) -> Iterator[tuple[Cluster, Path]]:
    """A cluster that answers; gives it and the kubeconfig that leads to it."""
    cluster = Cluster(folder)
    handler = type("Own", (Handler,), {"cluster": cluster})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    config = folder / "kubeconfig"
    named = {"cluster": "fake", "user": "me", "namespace": "default"}
    config.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{http.server_port}"}}],
                "users": [{"name": "me", "user": {"token": "x"}}],
                "contexts": [{"name": "here", "context": named}],
            }
        )
    )
    try:
        yield cluster, config
    finally:
        http.shutdown()
        http.server_close()
        cluster.close()
