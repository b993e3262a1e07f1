"""Owns the daemons of the throw-away Slurm, so that none outlives it: `python -m launcher.keeper DIR NODES [NETWORK]`.

It stays in the background until it gets TERM, or until one of the daemons ends; then it cancels all jobs, stops the
daemons and reaps what they leave. Where the nodes are hosts with a network of their own, it makes and removes that too,
and a host may be lost.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cluster.devslurm import DevSlurm
from launcher import process

TAG = "VQSCALE_DEVSLURM"
"""Variable that every daemon carries: the directory of its Slurm."""

_START_S = 20.0
_POLL_S = 0.1
_STOP_S = 5.0


class Keeper:
    """Starts the daemons of a Slurm whose files are made, and ends them.

    Args:
        made: the Slurm.
    """

    def __init__(self, made: DevSlurm) -> None:
        self._made = made
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._asked = False

    def run(self) -> int:
        """Keep the daemons until TERM or INT; returns 0, or 1 when one of them ended by itself."""
        process.adopt_orphans()  # slurmstepd leaves its slurmd
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)
        try:
            if self._made.hosts:
                self._made.hosts.make()
            self._start(self._made.munged())
            if self._wait_for_munge():
                for command in self._made.daemons():
                    self._start(command)
            needed = self._daemons[:2] if self._made.hosts else self._daemons
            while not self._asked and all(daemon.poll() is None for daemon in needed):
                _reap_strangers(self._daemons)
                time.sleep(_POLL_S)
        finally:
            self._stop()
        return 0 if self._asked else 1

    def _start(self, command: Sequence[str]) -> None:
        environment = {**self._made.environment(), TAG: str(self._made.root)}
        with (self._made.root / "log" / f"{Path(command[0]).name}.out").open("ab") as log:
            daemon = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=functools.partial(process.die_with, os.getpid()),
            )
        self._daemons.append(daemon)

    def _wait_for_munge(self) -> bool:
        limit = time.monotonic() + _START_S
        while not self._made.socket.exists():
            if self._asked or self._daemons[0].poll() is not None or time.monotonic() > limit:
                return False
            time.sleep(_POLL_S)
        return True

    def _stop(self) -> None:
        if self._made.states():
            self._made.drain()
        munged, others = self._daemons[:1], self._daemons[1:]
        if self._made.hosts:  # the first process of a host is deaf to TERM
            for host in others[1:]:
                host.kill()
        _end(others)
        _end(munged)  # last: the others sign their farewells
        process.end_tagged(TAG, str(self._made.root), grace_s=1)
        process.reap_orphans()
        if self._made.hosts:
            self._made.hosts.end()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def _end(daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _reap_strangers(ours: Sequence[subprocess.Popen[bytes]]) -> None:
    """Collect adopted children that have ended, and leave the daemons' own ends to `Popen`."""
    known = {daemon.pid for daemon in ours}
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in known:
        os.waitpid(ended.si_pid, 0)


def main() -> int:
    """Entry of `python -m launcher.keeper`."""
    parser = argparse.ArgumentParser(prog="python -m launcher.keeper", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("nodes", type=int)
    parser.add_argument("network", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    return Keeper(DevSlurm(arguments.directory, arguments.nodes, arguments.network)).run()


if __name__ == "__main__":
    sys.exit(main())
