"""Real processes for tests: each is a rank with the environment that torchrun would give it.

Imports no torch, so that a child sets its environment before torch is loaded.
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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_GRACE_S = 10.0
"""For the other ranks when one has failed: their collectives end because of it."""


class RanksFailedError(AssertionError):
    """A rank raised, died or did not answer in time; `tracebacks` has the last words of each that failed."""

    def __init__(self, tracebacks: dict[int, str]) -> None:
        self.tracebacks = tracebacks
        super().__init__("\n".join(f"--- rank {rank}\n{text}" for rank, text in sorted(tracebacks.items())))


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
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
    context = multiprocessing.get_context("spawn")
    work, port = pickle.dumps((function, args)), free_port()
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
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    try:
        function, args = pickle.loads(work)
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
    done = subprocess.run([*agent, *words], cwd=house, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
