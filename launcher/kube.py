"""One stage in a Kubernetes cluster: `python -m launcher.kube MANIFEST`, as `srun` is for Slurm.

It makes the object of the manifest, watches it to its end, and copies the last lines of its pods. A request to stop
deletes the object: pods get TERM, upon which the stage saves. What earlier attempts of the run have left is ended
first. A cluster that does not answer for a while is waited for.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import yaml

from launcher.kube_api import RUN_LABEL, Cluster, Outcome, UnreachableError
from vqscale.errors import EXIT_USER_ERROR, UserError
from vqscale.files import write_json

T = TypeVar("T")

MARGIN_S = 20
"""Seconds above the grace that the cluster is given to end pods."""
_POLL_S = 1.0
_TICK_S = 0.1
_PATIENCE_S = 300.0
_LINES = 200


class Stage:
    """The object of a stage.

    Args:
        cluster: where.
        manifest: what.
        grace_s: seconds that its pods have to stop by themselves.
        remove: delete it when it has ended, too.
    """

    def __init__(self, cluster: Cluster, manifest: dict[str, Any], grace_s: int, remove: bool = False) -> None:
        self._cluster, self._manifest, self._limit_s = cluster, manifest, grace_s + MARGIN_S
        self._remove = remove
        self._name = manifest["metadata"]["name"]
        self._asked = False
        self._told: dict[str, str] = {}
        self.lost: set[str] = set()
        """Nodes that pods were taken from."""

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handler of signals."""
        self._asked = True

    def run(self) -> int:
        """Run to the end; 0 when the cluster says that it is complete.

        Raises:
            UserError: the cluster refuses, or has not answered for too long.
        """
        label = self._manifest["metadata"]["labels"][RUN_LABEL]
        self._patiently(lambda: self._cluster.clear(label, self._limit_s))
        if self._asked:
            return 1
        tries = itertools.count()
        self._patiently(lambda: self._cluster.create(self._manifest, again=next(tries) > 0))
        if not self._asked:
            _say(f"{self._manifest['kind']} {self._name} is made")
        outcome = self._watch()
        if not outcome.ended or self._remove:
            if not outcome.ended:
                _say("asked to stop: it is deleted")
            self._cluster.delete(self._name)
            self._cluster.wait_for_end([self._name], self._limit_s)
        _say(f"{self._name}: {outcome.words or 'deleted'}")
        return 0 if outcome.success else 1

    def _watch(self) -> Outcome:
        """Until it has ended, or somebody asks to stop."""
        outcome = Outcome()
        while not self._asked:
            outcome = self._patiently(self._look) or outcome
            if outcome.ended:
                break
            self._pause()
        return outcome

    def _patiently(self, ask: Callable[[], T]) -> T | None:
        """The cluster's answer, which may take a while; None when somebody asks to stop meanwhile."""
        began = time.monotonic()
        while not self._asked:
            try:
                return ask()
            except UnreachableError as error:
                if time.monotonic() - began > _PATIENCE_S:
                    what = f"has not answered for {_PATIENCE_S:.0f} s ({error}); {self._name} may still run"
                    raise UserError(what, where="Kubernetes", mend="vqscale cancel ends it") from None
            self._pause()
        return None

    def _look(self) -> Outcome:
        outcome = self._cluster.outcome(self._name)
        pods = self._cluster.pods(self._name)
        self.lost |= {pod.node or name for name, pod in pods.items() if pod.disruption}
        words = {name: pod.words for name, pod in pods.items()}
        news = words if outcome.ended else {self._name: outcome.words, **words}
        for name, told in news.items():
            if told and self._told.get(name) != told:
                _say(f"{name}: {told}")
        self._told = news
        if outcome.ended:
            for pod in pods:
                for line in self._cluster.log(pod, _LINES).splitlines():
                    _say(f"{pod}: {line}")
        return outcome

    def _pause(self) -> None:
        limit = time.monotonic() + _POLL_S
        while time.monotonic() < limit and not self._asked:
            time.sleep(_TICK_S)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Entry of `python -m launcher.kube`."""
    parser = argparse.ArgumentParser(prog="python -m launcher.kube", description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--grace", type=int, required=True, metavar="SECONDS")
    parser.add_argument("--context")
    parser.add_argument("--remove", action="store_true", help="delete the object when it has ended")
    given = parser.parse_args()
    manifest = yaml.safe_load(given.manifest.read_text(encoding="utf-8"))
    try:
        cluster = Cluster(given.context, manifest["metadata"]["namespace"], manifest["kind"])
        stage = Stage(cluster, manifest, given.grace, given.remove)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, stage.ask)
        code = stage.run()
        if stage.lost:
            write_json(given.manifest.with_name("lost.json"), sorted(stage.lost))
        return code
    except UserError as error:
        print(f"error: {error}", flush=True)
    except UnreachableError as error:
        print(f"error: Kubernetes: does not answer ({error})", flush=True)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
