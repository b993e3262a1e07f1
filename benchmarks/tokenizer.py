"""Benchmark `tokenizer`: a training step of recipe `imagenet256`, against the network as it is commonly written.

A step begins with image bytes and ends with moved weights and codes. Ours goes through the engine and the task that
train; the peers are the same layers in plain torch with vector-quantize-pytorch. The ceiling is the convolutions of all
layers by themselves, forward and backward. It runs on the GPU where there is one, else on two threads; ours and the
ceiling in bf16, but in fp32 on a processor that has no units for bf16, as `precision: auto` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench
from benchmarks.machine import ROOT
from benchmarks.one_process import one_process
from benchmarks.quantizer import threads
from benchmarks.quantizer_gpu import wait
from benchmarks.quantizer_peers import find
from benchmarks.result import at_least
from benchmarks.timing import Contender, Race
from benchmarks.tokenizer_check import check_cost, check_networks
from benchmarks.tokenizer_cost import Convolution, convolutions, search_flops
from benchmarks.tokenizer_peers import PlainTrainer, PlainVQVAE2, Shape, normalised
from vqscale.config.load import load_recipe
from vqscale.config.recipe import Recipe
from vqscale.config.vqvae2 import VQVAE2
from vqscale.models.vqvae import VQVAE
from vqscale.processor import has_bf16
from vqscale.seeds import mix
from vqscale.training.build import build_tokenizer
from vqscale.training.distributed import Ranks
from vqscale.training.engine import Engine
from vqscale.training.heap import keep_heap
from vqscale.training.steps import Steps
from vqscale.training.tokenizer_task import TokenizerTask
from vqscale.training.transfer import DeviceBatch

GOALS = {"vs_plain_peer": at_least(3.5), "fraction_of_bf16_conv_ceiling": at_least(0.60)}
PACKAGES = ("accelerate", "vector-quantize-pytorch", "triton")

THREADS = 2
RECIPE = ROOT / "pipelines" / "recipes" / "imagenet256.yaml"
SMALL = ("data.image_size=32", "tokenizer.hidden=16", "tokenizer.residual_hidden=8")
"""What `--quick` changes in the recipe."""

_UNIT, _SETS = "images/s", 3
_CPU_BATCH, _GPU_BATCH, _QUICK_BATCH = 16, 128, 4
_GPU_STEPS = 40  # a lap, so that it takes about half a second


@dataclass(frozen=True)
class Problem:
    """What all contenders train on."""

    recipe: Recipe
    settings: VQVAE2
    """The recipe's tokenizer."""
    sets: Sequence[Tensor]
    """uint8 [B, S, S, 3] each, on the device."""
    steps: int
    """Steps of a lap."""

    @property
    def half(self) -> bool:
        """Whether ours and the ceiling compute in bf16."""
        return self.settings.training.precision == "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """In which they do."""
        return torch.bfloat16 if self.half else torch.float32

    @property
    def grids(self) -> list[int]:
        """Side of each level's grid, the finest first."""
        return [level.grid for level in self.recipe.levels]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.sets[0].device

    @property
    def batch(self) -> int:
        """Images of a step."""
        return len(self.sets[0])

    def contender(self, name: str, step: Callable[[Tensor], object]) -> Contender:
        """Takes the sets in turn; a lap ends when the device has done its steps."""
        source = itertools.cycle(self.sets)

        def work() -> float:
            for images in itertools.islice(source, self.steps):
                step(images)
            wait(self.device)
            return self.batch * self.steps

        return Contender(name, work)


class Ours:
    """The tokenizer's stage in this process, without loader and logs."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        settings = recipe.tokenizer
        network = build_tokenizer(settings)
        assert isinstance(settings, VQVAE2)
        assert isinstance(network, VQVAE)
        self.network = network
        engine = Engine(self.network, settings.training, ranks)
        fixed = np.zeros((1, recipe.data.image_size, recipe.data.image_size, 3), np.uint8)
        names = [level.name for level in recipe.levels]
        self._steps = Steps(TokenizerTask(engine, settings, names, recipe.seed, list, fixed))
        self._seed, self._step, self._rank = recipe.seed, 0, ranks.rank

    def step(self, images: Tensor) -> Tensor:
        """What `vqscale.training.loop` does in a step, on this rank's uint8 [B, S, S, 3] of the batch; the loss."""
        torch.manual_seed(mix(self._seed, self._step, self._rank))
        index = self._rank * len(images) + torch.arange(len(images))
        self._steps.take(DeviceBatch(self._step, {"image": images}, index))
        self._step += 1
        return self._steps.losses["total"]


def run(bench: Bench) -> None:
    """Check and race."""
    with threads(THREADS), one_process() as ranks:
        if ranks.device.type == "cpu":
            keep_heap()  # as stages do; the peers have it too
        torch.manual_seed(0)
        problem = make_problem(bench.quick, ranks.device)
        ours = Ours(problem.recipe, ranks)
        layers = layers_of(ours.network, problem.settings, problem.recipe.data.image_size)
        describe(bench, problem, layers)
        ours.step(problem.sets[0])  # sets the first codes from its latents
        check_cost(bench, layers, problem.batch, problem.dtype.itemsize, lambda: ours.step(problem.sets[1]))
        contenders = [problem.contender("ours", ours.step), *peers(bench, problem, ours.network)]
        limits = [ceiling(layers, problem), peak(layers, problem)]
        race = bench.race("training steps", [*contenders, *limits])
    keep(bench, problem, race, contenders)
    bounds(bench, race, problem, sum(layer.training_flops for layer in layers))


def make_problem(quick: bool, device: torch.device) -> Problem:
    """Recipe `imagenet256` on one process, with a batch that fits, and smooth noise for images."""
    large = _GPU_BATCH if device.type == "cuda" else _CPU_BATCH
    batch = _QUICK_BATCH if quick else large
    precision = "bf16" if device.type != "cpu" or has_bf16() else "fp32"
    changed = ("resources.processes=1", f"tokenizer.training.global_batch={batch}")
    changed += (f"tokenizer.training.precision={precision}", *(SMALL if quick else ()))
    recipe = load_recipe(RECIPE, changed)
    assert isinstance(recipe.tokenizer, VQVAE2)
    side, generator = recipe.data.image_size, torch.Generator().manual_seed(0)
    sets = []
    for _ in range(_SETS):
        coarse = torch.rand(batch, 3, side // 8, side // 8, generator=generator)
        images = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1).mul(255).byte()
        sets.append(images.permute(0, 2, 3, 1).contiguous().to(device))
    return Problem(recipe, recipe.tokenizer, sets, _GPU_STEPS if device.type == "cuda" and not quick else 1)


def layers_of(network: VQVAE, settings: VQVAE2, image_size: int) -> list[Convolution]:
    """The convolutions of a tokenizer."""
    return convolutions(network.shapes, [level.dim for level in settings.levels], image_size)


def describe(bench: Bench, problem: Problem, layers: Sequence[Convolution]) -> None:
    """Sizes, choices and costs."""
    levels = problem.settings.levels
    sizes = [level.codes for level in levels], [level.dim for level in levels], problem.grids
    bench.config |= {
        "recipe": "imagenet256" + (" made small" if bench.quick else ""),
        "image_size": problem.recipe.data.image_size,
        "batch": problem.batch,
        "steps_a_lap": problem.steps,
        "device": problem.device.type,
        "threads": THREADS,
        "images": "smooth noise, uint8, in memory; three batches take turns",
        "precision": problem.settings.training.precision,
        "ours": f"{'bf16 autocast' if problem.half else 'fp32'}, channels last, gradient clipping, AdamW, restarts, as "
        "the recipe has it",
        "plain": "fp32, NCHW, Adam without clipping; VectorQuantize with the recipe's decay and commitment, "
        "rotation_trick=False (straight through, as ours, and cheaper), otherwise its defaults (no restarts)",
        "plain_bf16": "the same under bf16 autocast",
        "flops_per_image": sum(layer.training_flops for layer in layers),
        "search_flops_per_image": search_flops(*sizes),
        "conv_bytes_per_batch": sum(layer.training_bytes(problem.batch, problem.dtype.itemsize) for layer in layers),
    }


def peers(bench: Bench, problem: Problem, ours: VQVAE) -> Iterator[Contender]:
    """The plain network in fp32 and under autocast, if its package is there; checked."""
    package = find("vector_quantize_pytorch", "vector-quantize-pytorch")
    if isinstance(package, str):
        bench.skip("plain", package)
        return
    settings = problem.settings
    level, commitment = settings.levels[0], settings.quantizer.commitment
    shape = Shape(settings.hidden, settings.residual_blocks, settings.residual_hidden, level.dim, level.codes)
    ways = [("plain", False), ("plain_bf16", True)]
    if not problem.half:
        bench.skip("bf16", "this processor has no units for it: ours and the ceiling are in fp32, as its peer")
        ways.pop()
    for name, half in ways:
        network = PlainVQVAE2(package, shape, settings.quantizer.decay, commitment).to(problem.device)
        if not half:
            check_networks(bench, ours, network, normalised(problem.sets[2][:2]), commitment)
        network.take(ours)
        trainer = PlainTrainer(network, settings.training.learning_rate, half=half)
        yield problem.contender(name, trainer.step)


def ceiling(layers: Sequence[Convolution], problem: Problem) -> Contender:
    """Forward and backward of every layer's convolution, one after the other, and nothing else."""
    calls = [call for layer in layers for call in alone(layer, problem.batch, problem.device, problem.dtype)]

    def step(_: Tensor) -> None:
        for call in calls:
            call()

    return problem.contender("convolutions", step)


def peak(layers: Sequence[Convolution], problem: Problem) -> Contender:
    """The forward of that 3×3 layer that has the most operations; operations."""
    layer = max((layer for layer in layers if layer.kernel == 3), key=lambda layer: layer.flops)
    forward, _ = alone(layer, problem.batch, problem.device, problem.dtype)

    def work() -> float:
        for _ in range(8 * problem.steps):
            forward()
        wait(problem.device)
        return 8 * problem.steps * problem.batch * layer.flops

    return Contender("peak", work)


def alone(
    layer: Convolution, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """Forward and backward of a layer without its bias, in channels-last memory."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)

    ends = (layer.inputs, layer.outputs) if layer.transposed else (layer.outputs, layer.inputs)
    image = random(batch, layer.inputs, layer.side, layer.side)
    gradient = random(batch, layer.outputs, layer.out_side, layer.out_side)
    kernel = random(*ends, layer.kernel, layer.kernel)
    stride, padding = [layer.stride] * 2, [layer.padding] * 2
    options = (stride, padding, [1, 1], layer.transposed, [0, 0], 1)
    wanted = [not layer.first, True, False]
    return (
        lambda: torch.ops.aten.convolution(image, kernel, None, *options),
        lambda: torch.ops.aten.convolution_backward(gradient, image, kernel, None, *options, wanted),
    )


def keep(bench: Bench, problem: Problem, race: Race, contenders: Sequence[Contender]) -> None:
    """Every contender's rate, and ours against each peer."""
    for name in (contender.name for contender in contenders):
        bench.figure(name, race.rates(name), _UNIT)
        if problem.device.type == "cpu":
            bench.figure(f"{name}_cpu", race.cpu_rates(name), "images/CPU s")
        if name != "ours":
            bench.ratio(f"vs_{name}_peer", race.rates("ours"), race.rates(name))


def bounds(bench: Bench, race: Race, problem: Problem, flops: int) -> None:
    """Ours against the convolutions by themselves, and against the best rate that any of them has."""
    rates = race.rates("ours")
    bench.figure("ours_gflops", [rate * flops / 1e9 for rate in rates], "GFLOP/s")
    formula = (
        "forward, gradient of the kernel and gradient of the input of every layer's convolution, one after the other, "
        f"{problem.settings.training.precision}, channels last, no bias: a step in which nothing else costs time"
    )
    bench.floor("convolutions", race.rates("convolutions"), _UNIT, formula)
    bench.ratio("fraction_of_bf16_conv_ceiling", rates, race.rates("convolutions"))
    best = [rate / flops for rate in race.rates("peak")]
    formula = f"{flops:,} operations an image at the rate of the forward of its largest 3×3 convolution"
    bench.floor("peak", best, _UNIT, formula)
    bench.ratio("fraction_of_bf16_conv_peak", rates, best)
