"""What runs on every node: `python -m cluster.preflight.node`, started by a backend. Prints JSON.

The first word is said at once, so that who started it can compare the clocks; the second has all that was measured
(`report`). Which node it is the backend says by the variables below.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from cluster.preflight import sharing
from cluster.preflight.collective import Meeting
from cluster.preflight.disk import look_at_folder
from cluster.preflight.gpus import look_at_gpus
from cluster.preflight.host import look_at_host
from cluster.preflight.reading import read_shards
from cluster.preflight.report import Report, Torch, to_lines
from cluster.rendezvous import NODE, agent_arguments
from vqscale.files import read_json

INDEX, ENDPOINT = "VQSCALE_NODE_INDEX", "VQSCALE_ENDPOINT"
"""Variables that the backend sets beside the node's name: its number from 0, where the agents meet (empty: here)."""
ADDRESS = "VQSCALE_ADDRESS"
"""And where the other nodes reach this one, where that is not the name that it has for itself."""

_MEETING_S = 120.0
_END_S = 20.0
_ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?(?:[\w.]+\.)?(?!ChildFailed)\w*Error: .+")


def main() -> int:
    """Entry of `python -m cluster.preflight.node`."""
    parser = argparse.ArgumentParser(prog="python -m cluster.preflight.node", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder that should be shared")
    parser.add_argument("--token", required=True, help="of this trial")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--shards", default="", metavar="URL")
    parser.add_argument("--patience", type=float, default=30.0, metavar="SECONDS", help="for the others' tokens")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the agent is ended too
    name = os.environ.get(NODE) or socket.gethostname()
    print(*to_lines(name, {"hello": time.time(), "node": name}), sep="\n", flush=True)
    print(*to_lines(name, {"report": asdict(_measure(name, given))}), sep="\n", flush=True)
    return 0


def _measure(name: str, given: argparse.Namespace) -> Report:
    index, endpoint = int(os.environ.get(INDEX, "0")), os.environ.get(ENDPOINT, "")
    token_fault = sharing.leave(given.folder, name, given.token)
    # All nodes and the machine that asks. Where the folder is not shared they wait in vain, and meet all the same.
    sees = sharing.await_all(given.folder, given.token, given.nodes + 1, given.patience)
    torch = _look_at_torch()
    port_fault = _port_fault(endpoint) if index == 0 and endpoint else ""
    processes = torch.gpus or (2 if given.nodes == 1 else 1)
    meeting, meeting_fault = _meet(given.nodes, index, endpoint, processes, given.token)
    return Report(
        node=name,
        host=look_at_host(),
        gpus=look_at_gpus(),
        torch=torch,
        folder=look_at_folder(given.folder, f"{name}.bytes"),
        sees=sees,
        token_fault=token_fault,
        port_fault=port_fault,
        reading=read_shards(given.shards, index, given.nodes) if given.shards else None,
        meeting=meeting,
        meeting_fault=meeting_fault,
    )


def _look_at_torch() -> Torch:
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        return Torch(fault=f"{type(error).__name__}: {error}")
    return Torch(torch.cuda.device_count(), torch.version.cuda or torch.version.hip or "")


def _port_fault(endpoint: str) -> str:
    """Why nobody can listen at the rendezvous' address on this node."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_server((host, int(port))):
            return ""
    except OSError as error:
        return f"{endpoint}: {error.strerror or error}"


def _meet(nodes: int, index: int, endpoint: str, processes: int, token: str) -> tuple[Meeting | None, str]:
    """Start torch's agent as a stage would, with ranks that meet and measure."""
    agent = agent_arguments(
        rdzv_id=f"preflight-{token}",
        processes=processes,
        max_restarts=0,
        nodes=nodes,
        endpoint=endpoint,
        holds_store=index == 0 if endpoint else None,
        address=os.environ.get(ADDRESS, ""),
    )
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "meeting.json"
        command = [sys.executable, "-m", "torch.distributed.run", *agent, "-m", "--", "cluster.preflight.collective"]
        fault = _run([*command, str(result)])
        found = read_json(result)
    return (Meeting(**found), "") if found and not fault else (None, fault or "it left no result")


def _run(command: list[str]) -> str:
    """Run the agent; returns what it failed of, or nothing. Its ranks end with it, however this process ends."""
    agent = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        told, _ = agent.communicate(timeout=_MEETING_S)
    except subprocess.TimeoutExpired:
        return f"the ranks had not met after {_MEETING_S:.0f} s"
    finally:
        _end(agent)
    return "" if agent.returncode == 0 else _why(told) or f"exit code {agent.returncode}"


def _end(agent: subprocess.Popen[str]) -> None:
    """Ask the agent to end, which ends its ranks; nothing happens when it has ended."""
    if agent.poll() is None:
        agent.terminate()
        with suppress(subprocess.TimeoutExpired):
            agent.communicate(timeout=_END_S)
        agent.kill()
        agent.wait()


def _why(told: str) -> str:
    """The first error that a rank names; the agent prints tables behind it. Else the last line."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    return (errors[:1] or lines[-1:] or [""])[0][:300]


if __name__ == "__main__":
    sys.exit(main())
