"""Benchmark `prior`: a training step of a transformer over code grids, against x-transformers' with equal layers.

A step begins with codes and ends with moved weights. Ours goes through the engine and the task that train. The ceiling
is all matrix products of the step by themselves, those of attention among them. It runs on the GPU where there is one,
else on two threads; ours and the ceiling in bf16, but in fp32 on a processor that has no units for bf16, where fp32 is
several times faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Bench
from benchmarks.machine import threads
from benchmarks.one_process import one_process
from benchmarks.prior_cost import Cost
from benchmarks.prior_peers import XTrainer, XTransformers
from benchmarks.quantizer_gpu import wait
from benchmarks.quantizer_peers import find
from benchmarks.result import at_least
from benchmarks.timing import Contender, Race
from vqscale.config.prior import TransformerNetwork
from vqscale.config.recipe import Prior
from vqscale.config.training import Training
from vqscale.models.network import GridShape
from vqscale.models.transformer import Transformer
from vqscale.processor import has_bf16
from vqscale.seeds import mix
from vqscale.training.build import build_prior
from vqscale.training.distributed import Ranks
from vqscale.training.engine import Engine
from vqscale.training.heap import keep_heap
from vqscale.training.prior_task import PriorTask
from vqscale.training.steps import Steps
from vqscale.training.transfer import DeviceBatch

GOALS = {"vs_x_transformers": at_least(2.5), "fraction_of_bf16_matmul_ceiling": at_least(0.55)}
PACKAGES = ("accelerate", "x-transformers")

THREADS, CODES, SETS = 2, 512, 3
LEVEL = "top"
_UNIT, _RATE, _LOGITS = "codes/s", 3e-4, 1e-3
_PEAK_SIDE, _QUICK_SIDE = 2048, 128


@dataclass(frozen=True)
class Size:
    """What is trained."""

    network: TransformerNetwork
    side: int
    """Of the grid."""
    batch: int
    """Sequences of a step."""


SIZES = {
    "cpu": Size(TransformerNetwork(size="S"), 32, 8),
    "cuda": Size(TransformerNetwork(size="L"), 32, 32),
    "quick": Size(TransformerNetwork(layers=1, width=32, heads=2), 8, 2),
}


@dataclass(frozen=True)
class Problem:
    """What all contenders train on."""

    size: Size
    sets: Sequence[Tensor]
    """int64 [B, side, side] each, on the device."""

    @property
    def grid(self) -> GridShape:
        """The only level."""
        return GridShape(self.size.side, CODES)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.sets[0].device

    @property
    def half(self) -> bool:
        """Whether ours and the ceiling compute in bf16: not on a processor without units for it."""
        return self.device.type != "cpu" or has_bf16()

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """What ours and the ceiling compute in."""
        return "bf16" if self.half else "fp32"

    def numbers(self, *shape: int) -> Tensor:
        """Random ones in this precision."""
        dtype = torch.bfloat16 if self.half else torch.float32
        return torch.randn(shape, device=self.device).to(dtype)

    def contender(self, name: str, step: Callable[[Tensor], object]) -> Contender:
        """Takes the sets in turn; a lap is a step."""
        source = itertools.cycle(self.sets)

        def work() -> float:
            codes = next(source)
            step(codes)
            wait(self.device)
            return codes.numel()

        return Contender(name, work)


class Ours:
    """The prior's stage in this process, without loader and logs."""

    def __init__(self, problem: Problem, ranks: Ranks) -> None:
        batch = problem.size.batch
        training = Training(steps=1_000_000, global_batch=batch, learning_rate=_RATE, precision=problem.precision)
        settings = Prior(networks=(problem.size.network,), class_dropout=0.0, training=training)
        prior = build_prior(settings, [problem.grid], 0)
        network = prior.networks[0]
        assert isinstance(network, Transformer)
        self.network = network
        self._steps = Steps(PriorTask(Engine(prior, training, ranks), settings, [LEVEL], 0, list))
        self._step = 0

    def step(self, codes: Tensor) -> Tensor:
        """What `vqscale.training.loop` does in a step, on int64 [B, side, side]; the loss."""
        torch.manual_seed(mix(0, self._step, 0))
        labels = torch.full((len(codes),), -1, device=codes.device)
        self._steps.take(DeviceBatch(self._step, {LEVEL: codes, "label": labels}, torch.arange(len(codes))))
        self._step += 1
        return self._steps.losses["total"]


def run(bench: Bench) -> None:
    """Check and race."""
    with threads(1 if bench.quick else THREADS), one_process() as ranks:
        if ranks.device.type == "cpu":
            keep_heap()  # as stages do; the peers have it too
        torch.manual_seed(0)
        problem = make_problem(bench.quick, ranks.device)
        ours = Ours(problem, ranks)
        cost = Cost(ours.network.shape, CODES, problem.grid.length)
        describe(bench, problem, cost)
        check_cost(bench, ours, problem, cost)
        contenders = [problem.contender("ours", ours.step), *peers(bench, problem, ours.network)]
        side = _QUICK_SIDE if bench.quick else _PEAK_SIDE
        race = bench.race("training steps", [*contenders, ceiling(cost, problem), peak(problem, side)])
    keep(bench, race, contenders)
    bounds(bench, race, cost, problem.precision, side)


def make_problem(quick: bool, device: torch.device) -> Problem:
    """Random codes."""
    size = SIZES["quick" if quick else device.type]
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch, size.side, size.side)
    return Problem(size, [torch.randint(CODES, shape, generator=generator).to(device) for _ in range(SETS)])


def describe(bench: Bench, problem: Problem, cost: Cost) -> None:
    """Sizes, choices and costs."""
    shape = cost.shape
    bench.config |= {
        "layers": shape.layers,
        "width": shape.width,
        "heads": shape.heads,
        "matrix_weights": cost.weights,
        "codes": CODES,
        "length": cost.length,
        "batch": problem.size.batch,
        "device": problem.device.type,
        "threads": torch.get_num_threads(),
        "precision": problem.precision,
        "ours": f"{'bf16 autocast' if problem.half else 'fp32'}, layer norm, GELU, learned positions, fused AdamW, "
        "gradient clipping; not compiled",
        "x_transformers": "equal layers, attn_flash, fp32 eager, fused AdamW, gradient clipping",
        "x_transformers_default": "the same without attn_flash, as is its default",
        "x_transformers_bf16": "the first under bf16 autocast",
        "flops_per_code": (cost.matrix_flops + cost.attention_flops) // cost.length,
    }


def check_cost(bench: Bench, ours: Ours, problem: Problem, cost: Cost) -> None:
    """The formula's operations of the matrices against what is counted; attention is not counted on every device."""
    with FlopCounterMode(display=False) as counter:
        ours.step(problem.sets[0])
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for kind, flops in counted.items() if "attention" not in str(kind))
    bench.check(
        "flops",
        "difference of the formula's operations in matrices to FlopCounterMode's, in a step of ours",
        abs(problem.size.batch * cost.matrix_flops - products),
        0,
    )


def peers(bench: Bench, problem: Problem, ours: Transformer) -> Iterator[Contender]:
    """x-transformers in three ways, checked against ours."""
    package = find("x_transformers", "x-transformers")
    if isinstance(package, str):
        bench.skip("x_transformers", package)
        return
    ways = [("x_transformers", True, False), ("x_transformers_default", False, False)]
    if problem.half:
        ways.append(("x_transformers_bf16", True, True))
    else:
        bench.skip("bf16", "this processor has no units for it: ours and the ceiling are in fp32, as its peers")
    for name, flash, half in ways:
        peer = XTransformers(package, ours, flash=flash).to(problem.device)
        if not half:
            check_logits(bench, f"{name}_logits", ours, peer, problem.sets[1][:2])
        yield problem.contender(name, XTrainer(peer, _RATE, half=half).step)


@torch.no_grad()
def check_logits(bench: Bench, key: str, ours: Transformer, peer: XTransformers, codes: Tensor) -> None:
    """Logits of both in fp32 with equal weights."""
    peer.take(ours)
    classes = torch.full((len(codes),), ours.no_class, device=codes.device)
    (mine,) = ours([], [codes], classes)
    theirs = peer.logits(codes)
    apart = float((mine - theirs).abs().max() / mine.std())
    bench.check(key, "largest difference of the logits, in deviations of ours, in fp32, equal weights", apart, _LOGITS)


def ceiling(cost: Cost, problem: Problem) -> Contender:
    """All products of a training step, one after the other, and nothing else."""
    rows = problem.size.batch * cost.length
    calls = [call for sizes in cost.matrices for call in _products(rows, *sizes, problem)]
    # Half of all pairs of positions: the products of all pairs, for half of the heads.
    heads, dim, length = problem.size.batch * cost.shape.heads // 2, cost.shape.head_width, cost.length
    narrow, square = problem.numbers(heads, length, dim), problem.numbers(heads, length, length)
    pairs = [lambda: narrow @ narrow.transpose(1, 2)] * 2 + [lambda: square @ narrow] * 4
    calls += pairs * cost.shape.layers

    def step(_: Tensor) -> None:
        for call in calls:
            call()

    return problem.contender("products", step)


def _products(rows: int, inputs: int, outputs: int, problem: Problem) -> list[Callable[[], Tensor]]:
    """Output, gradient of the input, gradient of the matrix."""
    x, y, weight = problem.numbers(rows, inputs), problem.numbers(rows, outputs), problem.numbers(outputs, inputs)
    return [lambda: x @ weight.T, lambda: y @ weight, lambda: y.T @ x]


def peak(problem: Problem, side: int) -> Contender:
    """Torch's product of two large square matrices; operations."""
    a = problem.numbers(side, side)

    def work() -> float:
        a @ a
        wait(problem.device)
        return 2.0 * side**3

    return Contender("peak", work)


def keep(bench: Bench, race: Race, contenders: Sequence[Contender]) -> None:
    """Every contender's rate, and ours against each peer."""
    for name in (contender.name for contender in contenders):
        bench.figure(name, race.rates(name), _UNIT)
        if name != "ours":
            bench.ratio(f"vs_{name}", race.rates("ours"), race.rates(name))


def bounds(bench: Bench, race: Race, cost: Cost, precision: str, side: int) -> None:
    """Ours against its products by themselves, and against the rate of a large product."""
    flops = (cost.matrix_flops + cost.attention_flops) / cost.length
    rates = race.rates("ours")
    bench.figure("ours_gflops", [rate * flops / 1e9 for rate in rates], "GFLOP/s")
    formula = (
        f"all matrix products of the step, one after the other, {precision}: of each matrix the output and both "
        "gradients, and attention's products of half of all pairs of positions; a step in which nothing else costs time"
    )
    bench.floor("products", race.rates("products"), _UNIT, formula)
    bench.ratio("fraction_of_bf16_matmul_ceiling", rates, race.rates("products"))
    best = [rate / flops for rate in race.rates("peak")]
    bench.floor("peak", best, _UNIT, f"{flops:,.0f} operations a code at the rate of a {precision} product of {side}²")
    bench.ratio("fraction_of_bf16_matmul_peak", rates, best)
