"""Benchmark `scaling`: the tokenizer's training step on 1, 2 and 4 processes, and a model of it on many GPUs.

Processes of one thread train on equal batches each, over gloo on this machine: by themselves (`one`, `pair`, `quartet`,
which compute at the same time and know nothing of each other) and as ranks of one training (`two`, `four`). `threads`
is one process with two threads and the batch of two. The collectives of a step are timed alone as well, in the same
rounds. `scaling_model` predicts the steps of `two` and `four` from the rest, and then those of a cluster.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.distributed import TCPStore

from benchmarks import machine
from benchmarks.harness import Bench
from benchmarks.network import cluster_of
from benchmarks.remote import Remote
from benchmarks.result import at_least, at_most
from benchmarks.scaling_prediction import GPU_BATCH, Measured, forecast
from benchmarks.scaling_ranks import Place
from benchmarks.timing import Contender, Race
from benchmarks.tokenizer import RECIPE, SMALL
from vqscale.config.load import load_recipe
from vqscale.processor import has_bf16

GOALS = {"two_processes_efficiency": at_least(0.92), "codebook_sync_share_of_step": at_most(0.01)}
PACKAGES = ("accelerate",)

WORLDS = {"two": 2, "four": 4}
TOGETHER = {"one": 1, "pair": 2, "quartet": 4}
_BATCH, _QUICK_BATCH = 2, 1
_LARGE, _SMALL = 16 << 20, 4
_REPEATS = {"small": 100, "codebooks": 50, "gradients": 10, "large": 4}
_QUICK_REPEATS = dict.fromkeys(_REPEATS, 2)
"""All-reduces of a lap."""
_UNIT = "images/s"
_LOSS = 0.02
"""Two ranks and one process with the same batch: sums in another order, in bf16 as the case may be."""


@dataclass
class Groups:
    """The processes, by name of their group."""

    host: Remote
    overrides: Sequence[str]
    batch: int
    stores: list[TCPStore] = field(default_factory=list)

    def start(self, name: str, world: int, threads: int = 1, batch: int | None = None, device: str = "cpu") -> None:
        """Make a group whose ranks train together."""
        # The ranks meet at a store of this process, whose port is taken from the beginning.
        self.stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        place = Place(0, world, threads, self.stores[-1].port, batch or self.batch, self.overrides, device)
        places = [{**asdict(place), "rank": rank} for rank in range(world)]
        self.host.ask(do="start", group=name, places=places)

    def ask(self, *names: str, **question: Any) -> list[dict[str, Any]]:
        """The answer of each rank of the groups."""
        found: list[dict[str, Any]] = self.host.ask(groups=names, **question)["ranks"]
        return found

    def training(self, name: str, groups: Sequence[str], images: int) -> Contender:
        """A lap is one step of all these groups at once."""

        def work() -> float:
            self.ask(*groups, do="steps", times=1)
            return images

        return Contender(name, work)

    def reducing(self, name: str, group: str, size: int, times: int) -> Contender:
        """A lap is some all-reduces one after the other, and what it takes to ask for them."""

        def work() -> float:
            self.ask(group, do="reduce", bytes=size, times=times)
            return times

        return Contender(name, work)


def run(bench: Bench) -> None:
    """Check, race, and predict."""
    cluster, source = cluster_of(bench.options.profile)
    overrides = (f"tokenizer.training.precision={precision()}", *(SMALL if bench.quick else ()))
    batch = _QUICK_BATCH if bench.quick else _BATCH
    describe(bench, overrides, batch)
    with started(bench, overrides, batch) as groups:
        buckets, codebooks = check(bench, groups)
        sizes = {
            "small": _SMALL,
            "codebooks": codebooks,
            "gradients": sum(buckets),
            "large": _LARGE,
        }
        race = bench.race("steps and collectives", contenders(groups, sizes, bench.config["repeats"]))
    keep(bench, race, sizes)
    prediction = forecast(measured(bench, race, sizes, buckets), cluster, source)
    if not prediction.compared:
        bench.skip("compared", "16 MiB took no longer to reduce than 4 bytes: too much else runs on this machine")
    bench.predict(prediction)


def measured(bench: Bench, race: Race, sizes: dict[str, int], buckets: tuple[int, ...]) -> Measured:
    """What the model is told, and what it is compared with."""
    return Measured(
        step_s={name: statistics.median(race.seconds(name)) for name in (*TOGETHER, *WORLDS)},
        reduce_s={
            (what, world): statistics.median(reducing_s(race, what, world))
            for what in sizes
            for world in WORLDS.values()
        },
        sizes=sizes,
        buckets=buckets,
        cores=bench.config["cores"],
        gpu_step_s=statistics.median(race.seconds("gpu")) if "gpu" in race.laps else None,
    )


def precision() -> str:
    """The recipe's bf16 where the processor computes with it; elsewhere it would be emulated."""
    return "bf16" if has_bf16() else "fp32"


def describe(bench: Bench, overrides: Sequence[str], batch: int) -> None:
    """Sizes and choices."""
    recipe = load_recipe(RECIPE, overrides)
    bench.config |= {
        "recipe": "imagenet256" + (" made small" if bench.quick else ""),
        "image_size": recipe.data.image_size,
        "precision": recipe.tokenizer.training.precision,
        "batch_a_process": batch,
        "threads_a_process": 1,
        "cores": machine.machine().cores,
        "backend": "gloo over loopback",
        "strategy": "ddp",
        "threads": "one process with two threads and the batch of two processes",
        "repeats": _QUICK_REPEATS if bench.quick else _REPEATS,
    }


@contextmanager
def started(bench: Bench, overrides: Sequence[str], batch: int) -> Iterator[Groups]:
    """All groups; those that train by themselves are warm."""
    # On a machine with too much to do, threads that wait for each other busily take seconds for a small step. In a
    # measurement they wait as stages do.
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if bench.quick else {}
    with Remote([sys.executable, "-m", "benchmarks.scaling_ranks"], waiting) as host:
        groups = Groups(host, overrides, batch)
        wanted = [(f"alone{number}", 1) for number in range(max(TOGETHER.values()))]
        for done, (name, world) in enumerate([*wanted, *WORLDS.items()]):
            bench.report("starting processes", done, len(wanted) + len(WORLDS) + 1)
            groups.start(name, world)
        groups.start("threads", 1, threads=2, batch=2 * batch)
        if torch.cuda.is_available():
            groups.start("gpu", 1, batch=GPU_BATCH, device="cuda")
        else:
            bench.skip("gpu", "torch sees no GPU; its step is assumed")
        # The first steps set the first codes and prepare kernels; those of `two` and `four` are in `check`.
        groups.ask(*(name for name, _ in wanted), do="steps", times=2)
        bench.report("starting processes", 1, 1)
        yield groups


def check(bench: Bench, groups: Groups) -> tuple[tuple[int, ...], int]:
    """Losses, codebooks and collectives of ranks; returns the bytes of the gradients' buckets and of the codebooks."""
    losses = [groups.ask(name, do="steps", times=1) for name in ("two", "threads")]
    of_two, of_one = (statistics.fmean(rank["loss"] for rank in ranks) for ranks in losses)
    what = "relative difference of the first loss of two ranks to that of one process with the same batch"
    bench.check("loss", what, abs(of_two / of_one - 1), _LOSS)
    for name, world in WORLDS.items():
        groups.ask(name, do="steps", times=2)  # DDP sorts its buckets anew after the first step
        looks = groups.ask(name, do="look")
        differing = sum(look["codebooks"] != looks[0]["codebooks"] for look in looks)
        bench.check(f"codebooks_{world}", "ranks whose codebooks differ from the first one's in any bit", differing, 0)
        seen = looks[0]["collectives"]
        buckets, (_, codebooks) = tuple(size for _, size in seen[:-1]), seen[-1]
        unlike = sum(look["collectives"] != seen for look in looks) + sum(kind != "allreduce_" for kind, _ in seen)
        bench.check(
            f"collectives_{world}", "ranks or collectives of a step that are no all-reduce as the others", unlike, 0
        )
        what = "bytes that a step's all-reduces but the last one carry beside the gradients"
        bench.check(f"gradients_{world}", what, abs(sum(buckets) - looks[0]["gradients"]), 0)
        what = "bytes of the last one beside the statistics of all codebooks: these take exactly one"
        bench.check(f"one_for_codebooks_{world}", what, abs(codebooks - looks[0]["statistics"]), 0)
    return buckets, codebooks


def contenders(groups: Groups, sizes: dict[str, int], repeats: dict[str, int]) -> list[Contender]:
    """Steps, then all-reduces by themselves."""
    batch = groups.batch
    found = [
        groups.training(name, [f"alone{number}" for number in range(count)], count * batch)
        for name, count in TOGETHER.items()
    ]
    found += [groups.training(name, [name], world * batch) for name, world in WORLDS.items()]
    found.append(groups.training("threads", ["threads"], 2 * batch))
    for name, world in WORLDS.items():
        for what, size in sizes.items():
            found.append(groups.reducing(f"{what}_{world}", name, size, repeats[what]))
    if torch.cuda.is_available():
        found.append(groups.training("gpu", ["gpu"], GPU_BATCH))
    return found


def reducing_s(race: Race, what: str, world: int) -> list[float]:
    """Seconds of one all-reduce, by round."""
    return [lap.wall / lap.done for lap in race.laps[f"{what}_{world}"]]


def keep(bench: Bench, race: Race, sizes: dict[str, int]) -> None:
    """Rates, collectives, and what is lost to them."""
    for name in (*TOGETHER, *WORLDS, "threads", *(["gpu"] if "gpu" in race.laps else [])):
        bench.figure(name, race.rates(name), _UNIT)
        bench.figure(f"{name}_cpu", race.cpu_rates(name), "images/CPU s")
    for world in WORLDS.values():
        for what in sizes:
            bench.figure(f"{what}_{world}_ms", [1e3 * value for value in reducing_s(race, what, world)], "ms")
    one, two, four = (race.rates(name) for name in ("one", "two", "four"))
    bench.floor("twice_one", [2 * rate for rate in one], _UNIT, "two processes that lose nothing: twice `one`")
    bench.ratio("two_processes_efficiency", two, race.rates("threads"))
    bench.ratio("codebook_sync_share_of_step", reducing_s(race, "codebooks", 2), race.seconds("two"))
    bench.ratio("gradient_sync_share_of_step", reducing_s(race, "gradients", 2), race.seconds("two"))
    bench.ratio("two_of_twice_one", two, [2 * rate for rate in one])
    bench.ratio("two_of_pair", two, race.rates("pair"))
    bench.ratio("four_of_quartet", four, race.rates("quartet"))
