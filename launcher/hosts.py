"""A stage on several hosts at once: `python -m launcher.hosts SPEC`, as `srun` is for Slurm.

It opens a connection of ssh to each host, where `launcher.on_host` runs the agent. Requests to stop go to all of them.
When one host fails, the others are stopped. Output comes as `host: line`.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from cluster.rendezvous import inherited
from launcher import process
from launcher.on_host import ALIVE_S, Request
from vqscale.errors import EXIT_USER_ERROR
from vqscale.files import read_json, write_json

MARGIN_S = 3
"""Seconds above the grace after which a host that does not answer is given up."""
_POLL_S = 0.1
_LAST_WORDS_S = 2.0
_NO_ANSWER = 255
"""Exit code of ssh when the connection, or what it started on the host, has not come to an end of its own."""


@dataclass(frozen=True)
class Spec:
    """What is sent to the hosts, but for the variables taken over from the surroundings."""

    run: str
    directory: str
    grace_s: int
    environment: dict[str, str]
    """Set for the stage."""
    inherit: list[str]
    """Allow-list of variables taken over from the surroundings."""
    own: list[str]
    """Those of them that each host has of its own, and that are not sent."""
    hosts: list[dict[str, str]]
    """Of each: `host`; `ssh`, the whole command; `runs`, what the host runs, empty to end what is left there."""

    def clearing(self, hosts: Collection[str]) -> Spec:
        """The same for some hosts, and with nothing to run: they end what is left there."""
        return replace(self, hosts=[{**host, "runs": ""} for host in self.hosts if host["host"] in hosts])

    def requests(self, surroundings: Mapping[str, str]) -> list[Request]:
        """What is sent to each host."""
        taken = inherited(surroundings, self.inherit)
        own = inherited(taken, self.own)
        given = {name: value for name, value in taken.items() if name not in own} | self.environment
        return [
            Request(host["host"], self.run, shlex.split(host["runs"]), given, self.directory, self.grace_s)
            for host in self.hosts
        ]


class Connection:
    """One host.

    Args:
        ssh: command that reaches it.
        request: what it shall do.
        say: takes each line of its output.
    """

    def __init__(self, ssh: Sequence[str], request: Request, say: Callable[[str], None]) -> None:
        self.host = request.host
        self._ssh = subprocess.Popen(
            ssh,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(process.die_with, os.getpid()),
        )
        self._reader = threading.Thread(target=self._pass_on, args=(say,), daemon=True)
        self._reader.start()
        self.send(request.line())

    def send(self, line: bytes = b"\n") -> None:
        """Send a line; a host that is gone is found by `poll`."""
        assert self._ssh.stdin is not None
        with suppress(OSError):
            self._ssh.stdin.write(line)
            self._ssh.stdin.flush()

    def poll(self) -> int | None:
        """Exit code; None while it runs."""
        return self._ssh.poll()

    def end(self) -> int:
        """Give it up if it still runs: its host ends by itself when the connection is gone. Returns the exit code."""
        self._ssh.kill()
        code = self._ssh.wait()
        self._reader.join(_LAST_WORDS_S)
        return code

    def _pass_on(self, say: Callable[[str], None]) -> None:
        assert self._ssh.stdout is not None
        for line in self._ssh.stdout:
            say(f"{self.host}: {line.decode(errors='replace').rstrip()}")


class Hosts:
    """Runs a spec on all of its hosts.

    Args:
        spec: what to run.
        say: takes each line of output.
    """

    def __init__(self, spec: Spec, say: Callable[[str], None]) -> None:
        self._spec, self._say = spec, say
        self._asked: list[str] = []
        self._deadline = float("inf")

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Handler of signals: USR2 is passed on as it is, all others as TERM."""
        self._asked.append("SIGUSR2" if number == signal.SIGUSR2 else "SIGTERM")

    def run(self, surroundings: Mapping[str, str]) -> dict[str, int]:
        """Run until all hosts have ended; their exit codes."""
        requests = self._spec.requests(surroundings)
        connections = [
            Connection(shlex.split(host["ssh"]), request, self._say)
            for host, request in zip(self._spec.hosts, requests, strict=True)
        ]
        try:
            self._watch(connections)
        finally:
            codes = {connection.host: connection.end() for connection in connections}
        return codes

    def _watch(self, connections: Sequence[Connection]) -> None:
        told = time.monotonic()
        while any(connection.poll() is None for connection in connections) and time.monotonic() < self._deadline:
            time.sleep(_POLL_S)
            failed = [connection.host for connection in connections if connection.poll()]
            if failed and self._deadline == float("inf") and not self._asked:
                self._say(f"{failed[0]} has failed: the others are stopped")
                self._asked.append("SIGTERM")
            if self._asked:
                self._pass_on(connections, self._asked.pop(0))
            elif time.monotonic() - told > ALIVE_S:
                told = time.monotonic()
                _send(connections, b"\n")

    def _pass_on(self, connections: Sequence[Connection], name: str) -> None:
        _send(connections, f"{name}\n".encode())
        self._deadline = min(self._deadline, time.monotonic() + self._spec.grace_s + MARGIN_S)


def _send(connections: Sequence[Connection], line: bytes) -> None:
    for connection in connections:
        connection.send(line)


def _clear(spec: Spec, hosts: Collection[str]) -> list[str]:
    """End what may live on hosts that have not come to an end themselves; returns those that do not answer."""
    silent = [host for host, code in Hosts(spec.clearing(hosts), _say).run({}).items() if code]
    for host in silent:
        _say(f"{host}: cannot be asked to end what is left there")
    return silent


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """Entry of `python -m launcher.hosts`."""
    parser = argparse.ArgumentParser(prog="python -m launcher.hosts", description=__doc__)
    parser.add_argument("spec", type=Path, help="file that the backend `ssh` has made")
    path = parser.parse_args().spec
    tree = read_json(path)
    if tree is None:
        print("error: no such file", file=sys.stderr)
        return EXIT_USER_ERROR
    spec = Spec(**tree)
    hosts = Hosts(spec, _say)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, hosts.ask)
    codes = hosts.run(os.environ)
    silent = _clear(spec, [host for host, code in codes.items() if code == _NO_ANSWER])
    if silent:
        write_json(path.with_name("lost.json"), silent)
    for host, code in codes.items():
        if code:
            _say(f"{host}: ended with code {code}" + (" (ssh)" if code == _NO_ANSWER else ""))
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
