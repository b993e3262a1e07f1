"""One host's part of a stage, started over ssh: `python -m launcher.on_host`, spoken to by `launcher.hosts`.

The first line of standard input is the request, as JSON; each further line is a signal's name, or empty: somebody is
still there. The connection is the life line. When it ends, or is silent for too long, the host ends its processes as
when it is asked to: TERM, the grace, KILL. So nothing is left on a host, whatever happens to the others, to the
network, or to the machine that submitted.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.rendezvous import NODE
from launcher import process
from vqscale.config.layout import RunLayout
from vqscale.errors import EXIT_USER_ERROR, UserError

HOST_TAG = "VQSCALE_ON_HOST"
"""Variable that every process of a run on a host carries: `host:run directory`. Two names may mean one machine."""
ALIVE_S = 5.0
"""How often the submitting side says that it is still there."""

_SILENCE_S = 60.0
_POLL_S = 0.1
_STRAGGLER_S = 1.0
_LEFTOVER_S = 5.0
_LAST_WORDS_S = 2.0
_KILL_S = 1.0
"""The agent kills its own processes when the grace is over; it is given this long to do so before it is killed."""


@dataclass(frozen=True)
class Request:
    """What is asked of a host."""

    host: str
    run: str
    """Run directory."""
    argv: list[str]
    """The agent; none to end what is left of the run on this host."""
    environment: dict[str, str]
    """Set above what a login on the host has."""
    directory: str
    grace_s: int

    @property
    def tag(self) -> str:
        """What this host's processes carry in `HOST_TAG`."""
        return f"{self.host}:{self.run}"

    def line(self) -> bytes:
        """As it is sent."""
        return json.dumps(asdict(self)).encode() + b"\n"


class HostPart:
    """Runs the agent of a request, and listens.

    Args:
        request: what to run.
        lines: what comes after the request; None when the connection has ended.
    """

    def __init__(self, request: Request, lines: queue.Queue[str | None]) -> None:
        self._request, self._lines = request, lines
        self._deadline = float("inf")
        self._heard = time.monotonic()

    def run(self) -> int:
        """Run to the end; returns the agent's exit code, 128 and the signal if it was killed.

        Raises:
            UserError: this host lacks the run directory or the folder of the code.
        """
        request = self._request
        process.adopt_orphans()
        # Two attempts must never write the same files.
        process.end_tagged(HOST_TAG, request.tag, _LEFTOVER_S)
        if not request.argv:
            return 0
        _refuse_what_is_missing(request)
        agent = self._start()
        # Not inherited: whoever holds sshd's pipe would keep the connection open when this process is killed.
        output = threading.Thread(target=_pass_on, args=(agent,), daemon=True)
        output.start()
        while agent.poll() is None:
            self._listen(agent)
            if time.monotonic() > self._deadline:
                _say("the agent did not end in time and is killed")
                agent.kill()
                agent.wait()
        process.end_tagged(HOST_TAG, request.tag, _STRAGGLER_S)
        process.reap_orphans()
        output.join(_LAST_WORDS_S)
        return agent.returncode if agent.returncode >= 0 else 128 - agent.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        request = self._request
        return subprocess.Popen(
            request.argv,
            env={**os.environ, **request.environment, HOST_TAG: request.tag, NODE: request.host},
            cwd=request.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=functools.partial(process.die_with, os.getpid()),
        )

    def _listen(self, agent: subprocess.Popen[bytes]) -> None:
        """Wait a moment for the next line, and do what it says."""
        now, ending = time.monotonic(), self._deadline < float("inf")
        try:
            line = self._lines.get(timeout=_POLL_S)
            self._heard = now
        except queue.Empty:
            if ending or now - self._heard < _SILENCE_S:
                return
            line = None
        if line == "" or (line is None and ending):
            return
        if line is None:
            _say("nobody is there any more: the processes are asked to stop")
        agent.send_signal(signal.Signals[line or "SIGTERM"])
        self._deadline = min(self._deadline, now + self._request.grace_s + _KILL_S)


def _refuse_what_is_missing(request: Request) -> None:
    for path in (str(RunLayout(Path(request.run)).info), request.directory):
        if not Path(path).exists():
            mend = "the hosts need one file system for runs, code and Python"
            raise UserError(f"{path} is not there", where=request.host, mend=mend)


def _pass_on(agent: subprocess.Popen[bytes]) -> None:
    assert agent.stdout is not None
    for line in agent.stdout:
        os.write(1, line)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read(lines: queue.Queue[str | None]) -> None:
    """Lines of standard input, then None. Not by `sys.stdin`, whose lock a thread must not hold when Python ends."""
    part = b""
    while chunk := os.read(0, 1 << 16):
        *whole, part = (part + chunk).split(b"\n")
        for line in whole:
            lines.put(line.decode())
    lines.put(None)


def main() -> int:
    """Entry of `python -m launcher.on_host`."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    first = lines.get()
    if first is None:  # the connection ended before anything was asked
        return EXIT_USER_ERROR
    try:
        return HostPart(Request(**json.loads(first)), lines).run()
    except UserError as error:
        _say(f"error: {error}")
        return EXIT_USER_ERROR
    except OSError as error:
        _say(f"error: the agent cannot start: {error}")
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
