"""The part of benchmark `quantizer` that runs on a GPU: the fused kernel against eager torch and tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench
from benchmarks.quantizer_check import excess
from benchmarks.result import at_least
from benchmarks.timing import Contender
from vqscale.models.nearest import assign, nearest_codes, tie_margin

GOALS = {"gpu_vs_eager": at_least(15)}

DIM, SIZE = 64, 512
_UNIT = "vectors/s"
_VECTORS, _REPEATS, _SAMPLE = 655_360, 20, 4_096  # both levels of 128 images of 256 pixels


def run(bench: Bench) -> None:
    """Measure, if there is a GPU."""
    if torch.cuda.is_available():
        measure(bench, torch.device("cuda"), 65_536 if bench.quick else _VECTORS)
    else:
        bench.skip("gpu", "torch sees no GPU")


def measure(bench: Bench, device: torch.device, vectors: int) -> None:
    """Check and race on a device."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(SIZE, DIM, generator=generator) + 1).to(device)
    z = codes[torch.randint(SIZE, (vectors,), generator=generator).to(device)]
    z = z + 0.5 * torch.randn(z.shape, generator=generator).to(device)
    what = "largest d²(found) - d²(nearest) in fp64, relative to the square of the summed lengths, centred"
    sample = z[:_SAMPLE]
    found = excess(sample, codes, nearest_codes(sample, codes))
    bench.check("gpu_codes", what, found, tie_margin(DIM, tensor_cores=True))
    bench.config["gpu"] = {"vectors": vectors, "codes": SIZE, "dim": DIM, "calls_a_lap": _REPEATS}
    work: dict[str, Callable[[], object]] = {
        "gpu_train": lambda: assign(z, codes, statistics=True),
        "gpu_train_bf16": lambda: assign(half, codes, statistics=True),
        "gpu_search": lambda: nearest_codes(z, codes),
        "gpu_eager": lambda: eager(z, codes),
    }
    half = z.bfloat16()
    race = bench.race("GPU", [repeated(name, call, vectors, device) for name, call in work.items()] + [product(device)])
    for name in work:
        bench.figure(name, race.rates(name), _UNIT)
    best = [rate / (2 * SIZE * DIM) for rate in race.rates("gpu_product")]
    bench.floor("gpu_search", best, _UNIT, "2·K·D operations a vector at the rate of a bf16 product of 8,192² matrices")
    bench.ratio("gpu_vs_eager", race.rates("gpu_train"), race.rates("gpu_eager"))
    bench.ratio("gpu_fraction_of_floor", race.rates("gpu_search"), best)


def repeated(name: str, call: Callable[[], object], done: int, device: torch.device) -> Contender:
    """A contender that calls many times and then waits for the device."""

    def work() -> float:
        for _ in range(_REPEATS):
            call()
        wait(device)
        return done * _REPEATS

    return Contender(name, work)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def eager(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, counts and sums by all distances and one-hot vectors, as VQ-VAEs are commonly written."""
    distance = z.square().sum(dim=1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(dim=1)
    nearest = distance.argmin(dim=1)
    one_hot = F.one_hot(nearest, len(codes)).to(z.dtype)
    return nearest, one_hot.sum(dim=0), one_hot.T @ z


def product(device: torch.device, side: int = 8_192) -> Contender:
    """Torch's bf16 product of two square matrices; floating-point operations."""
    side = side if device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return repeated("gpu_product", lambda: torch.mm(a, b), 2 * side**3, device)
