"""Real processes for tests: each is a rank with the environment that torchrun would give it.

A rank is forked from a server that has one thread and has imported what trainings need: importing takes four CPU
seconds, which is more than small tests do. The server's environment has what torch reads when it is loaded; the rest is
set in the rank.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

LIMIT_S = 240.0
"""For ranks of small trainings on a machine that has much else to do."""
_GRACE_S = 10.0
"""For the other ranks when one has failed: their collectives end because of it."""


_AT_LOADING = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
_LOADED = ["tests.training_helpers", "torch.utils.tensorboard"]


class RanksFailedError(AssertionError):
    """A rank raised, died or did not answer in time; `tracebacks` has the last words of each that failed."""

    def __init__(self, tracebacks: dict[int, str]) -> None:
        self.tracebacks = tracebacks
        super().__init__("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(tracebacks.items())))


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = LIMIT_S) -> list[Any]:
    """Call `function(*args)` in `world` processes at once.

    Args:
        world: number of processes.
        function: importable by name; joins the process group itself.
        args: picklable.
        timeout: seconds for all of it.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RanksFailedError: a rank raised, died, or the time was over.
    """
    context = _server()
    work, port = pickle.dumps((function, args, dict(os.environ))), free_port()
    children, pipes = [], []
    try:
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(rank, world, port, there, work), daemon=True)
            child.start()
            there.close()
            children.append(child)
            pipes.append(here)
        return _collect(pipes, [child.pid or 0 for child in children], timeout)
    finally:
        for child in children:
            child.join(1)
            child.kill()
            child.join()
        for pipe in pipes:
            pipe.close()


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    before = dict(os.environ)
    try:
        for name in before:
            if name.startswith("VQSCALE_"):  # processes of a run are found by what they hold of it
                del os.environ[name]
        os.environ.update(_AT_LOADING)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _collect(pipes: list[Connection], pids: list[int], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failed: dict[int, str] = {}
    end = time.monotonic() + timeout
    open_ranks = dict(enumerate(pipes))
    while open_ranks:
        ready = wait(list(open_ranks.values()), max(0.0, end - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, pipe in open_ranks.items() if pipe in ready]:
            good, value = _receive(open_ranks.pop(rank))
            (results if good else failed)[rank] = value
        if failed:
            end = min(end, time.monotonic() + _GRACE_S)
    for rank in open_ranks:
        os.kill(pids[rank], signal.SIGUSR1)  # its stack goes to standard error
        failed[rank] = "gave no answer in time" if len(failed) else f"gave no answer within {timeout} s"
    if open_ranks:
        time.sleep(0.5)
    if failed:
        raise RanksFailedError(failed)
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(pipe.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        return False, "died without a word"


def _child(rank: int, world: int, port: int, pipe: Connection, work: bytes) -> None:
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    try:
        function, args, environment = pickle.loads(work)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.clear()
        os.environ.update(environment | _AT_LOADING | {name: str(value) for name, value in places.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        answer = pickle.dumps((True, function(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)
    pipe.close()


def free_port() -> int:
    """A port of loopback that nobody uses, and that the kernel gives to nobody who asks for any port."""
    chosen = random.Random(os.getpid() + time.monotonic_ns())
    while True:
        port = chosen.randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def torchrun(processes: int, *words: str) -> None:
    """Run a stage under torch's elastic agent, as a user would; `words` stand behind the agent's own options."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    house = Path(__file__).parents[1]
    done = subprocess.run([*agent, *words], cwd=house, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
