"""The command cluster: a throw-away Slurm on this machine."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.devslurm import GPUS, DevSlurm, prepare
from launcher import process, registry
from launcher.backends.base import SOURCE
from launcher.keeper import TAG
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

EXIT_DOWN = 1
"""Exit code of `status` when no cluster is up."""

_MOST_NODES = 64
_START_S = 60.0
_STOP_S = 60.0


def cluster(arguments: argparse.Namespace) -> int:
    """Start, end or show the cluster; there is one for each $VQSCALE_HOME."""
    return {"up": _up, "down": _down, "status": _status}[arguments.action](arguments)


def _up(arguments: argparse.Namespace) -> int:
    if not 1 <= arguments.nodes <= _MOST_NODES:
        raise UserError(f"{arguments.nodes} nodes", where="--nodes", mend=f"choose 1 to {_MOST_NODES}")
    known = _known()
    if known is not None:
        raise UserError("is up already", where=str(known.root), mend="vqscale cluster down ends it")
    folder = Path(arguments.dir or registry.home() / "devslurm").expanduser().resolve()
    _clear(folder)
    made = prepare(folder, arguments.nodes, arguments.hosts)
    keeper = _start_keeper(made)
    facts = {"dir": str(folder), "nodes": made.nodes, "network": made.network}
    write_json(_record(), {**facts, "keeper": process.identity(keeper.pid)})
    _wait_until_ready(made, keeper)
    print(f"{made.nodes} nodes with {GPUS} fake GPUs each, below {folder}")
    _advise(made)
    return 0


def _down(arguments: argparse.Namespace) -> int:
    record = read_json(_record())
    if record is None:
        print("no cluster is up")
        return 0
    made = _recorded(record)
    folder = made.root
    _stop(record["keeper"], folder)
    _clear(folder)
    if made.hosts:
        made.hosts.end()  # what a keeper that was killed has left
    _record().unlink(missing_ok=True)
    print(f"ended; its logs are in {folder / 'log'}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    made = _known()
    if made is None:
        if arguments.conf:
            raise UserError("no cluster is up", where="vqscale cluster", mend="vqscale cluster up starts one")
        print("no cluster is up; vqscale cluster up starts one")
        return EXIT_DOWN
    if arguments.conf:
        print(made.conf)
        return 0
    states = made.states()
    for name in made.names:
        print(f"{name}  {states.get(name, 'the controller does not answer')}")
    _advise(made)
    return 0


def _record() -> Path:
    """Where the cluster that is up is written down, so that `down` finds it from any directory."""
    return registry.home() / "devslurm.json"


def _known() -> DevSlurm | None:
    """The cluster whose keeper lives; None when there is none."""
    record = read_json(_record())
    if record is None or not process.is_alive(record["keeper"]):
        return None
    return _recorded(record)


def _recorded(record: Mapping[str, Any]) -> DevSlurm:
    return DevSlurm(Path(record["dir"]), int(record["nodes"]), int(record.get("network", 0)))


def _start_keeper(made: DevSlurm) -> subprocess.Popen[bytes]:
    with (made.root / "log/keeper.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.keeper", str(made.root), str(made.nodes), str(made.network)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=SOURCE,
            start_new_session=True,
        )


def _wait_until_ready(made: DevSlurm, keeper: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + _START_S
    while not made.ready():
        if keeper.poll() is not None or time.monotonic() > limit:
            why = made.why()
            keeper.terminate()
            keeper.wait()
            _record().unlink(missing_ok=True)
            raise UserError(f"did not start ({why})", where=str(made.root), mend=f"see {made.root / 'log'}")
        time.sleep(0.1)


def _stop(keeper: Mapping[str, Any], folder: Path) -> None:
    process.terminate(keeper)
    limit = time.monotonic() + _STOP_S
    while process.is_alive(keeper):
        if time.monotonic() > limit:
            raise UserError("does not end", where=str(folder), mend=f"see {folder / 'log/keeper.log'}")
        time.sleep(0.05)


def _clear(folder: Path) -> None:
    """End what a keeper that was killed may have left."""
    process.end_tagged(TAG, str(folder), grace_s=5)


def _advise(made: DevSlurm) -> None:
    print(f"use it:   export SLURM_CONF={shlex.quote(str(made.conf))}")
    print("          vqscale submit RECIPE --on devslurm")
    print("end it:   vqscale cluster down")
