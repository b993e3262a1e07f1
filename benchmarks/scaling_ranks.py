"""Ranks of benchmark `scaling`: `python -m benchmarks.scaling_ranks`, asked over `benchmarks.remote`.

One program imports torch once and forks the ranks of all groups, before it has a thread that a fork would lose. A rank
trains as stage `tokenizer` does: engine, task and steps, without loader and logs.
"""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.remote import serve
from benchmarks.tokenizer import RECIPE, Ours
from vqscale.config.load import load_recipe
from vqscale.training.distributed import Ranks, process_group
from vqscale.training.heap import keep_heap

_SETS = 2
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """What a rank is told when it is made."""

    rank: int
    world: int
    threads: int
    port: int
    """Of the store that the ranks meet at, on this machine."""
    batch: int
    """Images of a rank."""
    overrides: Sequence[str]
    """Of recipe `imagenet256`."""
    device: str = "cpu"


class Collectives(TorchDispatchMode):
    """Notes every collective while it is entered, torch's own among them: its operator and bytes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note it."""
        if func.namespace == "c10d":
            tensors = [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            self.seen.append((func._schema.name.partition("::")[2], sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


class Rank:
    """Trains, and reduces made-up bytes, when it is asked to."""

    def __init__(self, place: Place, ranks: Ranks) -> None:
        self._ranks = ranks
        size = place.world * place.batch
        fixed = ("data.packet=1", f"resources.processes={place.world}", f"tokenizer.training.global_batch={size}")
        recipe = load_recipe(RECIPE, (*place.overrides, *fixed))
        torch.manual_seed(0)
        self._ours = Ours(recipe, ranks)
        first = place.rank * place.batch
        sets = [smooth_noise(size, recipe.data.image_size, seed) for seed in range(_SETS)]
        self._sets = [images[first : first + place.batch].to(ranks.device) for images in sets]
        self._taken = 0

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """To `steps`, `look` or `reduce`."""
        kind = question["do"]
        if kind == "steps":
            return self._steps(question["times"])
        return self._look() if kind == "look" else self._reduce(question["bytes"], question["times"])

    def _steps(self, times: int) -> dict[str, Any]:
        for _ in range(times):
            loss = self._ours.step(self._sets[self._taken % _SETS])
            self._taken += 1
        return {"loss": float(loss)}  # waits for a GPU

    def _look(self) -> dict[str, Any]:
        """A step whose collectives are noted, and what the codebooks are behind it."""
        with Collectives() as noted:
            self._steps(1)
        books = [buffer.cpu().numpy().tobytes() for book in self._ours.network.codebooks for buffer in book.buffers()]
        return {
            "collectives": noted.seen,
            "gradients": sum(4 * parameter.numel() for parameter in self._ours.network.parameters()),
            "statistics": sum(map(_statistics, self._ours.network.codebooks)),
            "codebooks": hashlib.sha256(b"".join(books)).hexdigest(),
        }

    def _reduce(self, size: int, times: int) -> dict[str, Any]:
        """All-reduces of zeros, one after the other."""
        data = torch.zeros(max(1, size // 4), device=self._ranks.device)
        began = time.perf_counter()
        for _ in range(times):
            self._ranks.sum(data)
        if data.is_cuda:
            torch.cuda.synchronize()
        return {"seconds": (time.perf_counter() - began) / times}


def _statistics(book: Any) -> int:
    """Bytes of what ranks add up for a codebook: fp32 counts, sums, donors and one error (`models.quantizer`)."""
    size, dim = book.codes.shape
    return int(4 * (size + size * dim + book.max_restarts * dim + 1))


def smooth_noise(count: int, side: int, seed: int) -> Tensor:
    """uint8 [count, side, side, 3] on the CPU."""
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    images = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1).mul(255).byte()
    return images.permute(0, 2, 3, 1).contiguous()


def live(place: Place, questions: Connection) -> None:
    """A rank's life; ends when the questions do."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The store is the asker's, so that no port is chosen before it is taken.
    os.environ |= {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_WORLD_SIZE": str(place.world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(place.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(place.threads),  # Accelerate sets torch's threads where their number is not given
    }
    try:
        torch.set_num_threads(place.threads)
        if place.device == "cpu":
            keep_heap()
        with process_group(place.device) as ranks:
            rank = Rank(place, ranks)
            questions.send({})
            while (question := questions.recv()) is not None:
                questions.send(rank.answer(question))
            dist.barrier()
    except Exception:
        questions.send({"error": f"rank {place.rank} of {place.world}: {traceback.format_exc()}"})


@dataclass
class Host:
    """Keeps the groups of ranks, and passes questions on to them."""

    groups: dict[str, list[Connection]] = field(default_factory=dict)
    children: list[Any] = field(default_factory=list)
    broken: bool = False
    """Whether a rank has failed, so that others may wait for it for ever."""

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """`start` makes a group; all else goes to every rank of the groups that are named, at once."""
        if question["do"] == "start":
            return self._start(question["group"], [Place(**place) for place in question["places"]])
        pipes = [pipe for name in question["groups"] for pipe in self.groups[name]]
        for pipe in pipes:
            pipe.send(question)
        return self._hear(pipes)

    def end(self) -> None:
        """Let all ranks end, and wait for them."""
        for pipe in (pipe for pipes in self.groups.values() for pipe in pipes):
            with suppress(BrokenPipeError):
                pipe.send(None)
        for child in self.children:
            if self.broken:
                child.kill()
            child.join()

    def _start(self, group: str, places: Sequence[Place]) -> dict[str, Any]:
        context = multiprocessing.get_context("fork")
        self.groups[group] = []
        for place in places:
            here, there = context.Pipe()
            child = context.Process(target=live, args=(place, there), daemon=True)
            child.start()
            there.close()
            self.groups[group].append(here)
            self.children.append(child)
        return self._hear(self.groups[group])

    def _hear(self, pipes: Sequence[Connection]) -> dict[str, Any]:
        """Every rank's answer, in order; the error of the first that fails."""
        answers: dict[Connection, Any] = {}
        while len(answers) < len(pipes):
            for pipe in wait([pipe for pipe in pipes if pipe not in answers]):
                answers[pipe] = found = self._one(pipe)  # type: ignore[index, arg-type]
                if "error" in found:
                    self.broken = True
                    return found
        return {"ranks": [answers[pipe] for pipe in pipes]}

    @staticmethod
    def _one(pipe: Connection) -> dict[str, Any]:
        try:
            found: dict[str, Any] = pipe.recv()
        except EOFError:
            return {"error": "a rank was killed"}
        return found


def main() -> None:
    """Answer until standard input ends."""
    host = Host()
    serve(host.answer)
    host.end()


if __name__ == "__main__":
    main()
