"""Benchmark `quantizer`: nearest codes and EMA statistics on two threads, against peers and the rate of fp32 products.

All contenders get latents of the same shape in channels-last memory, new ones each lap: three sets take turns, more
than the caches hold. Training is all that one step does to a level: codes, latents, commitment loss, statistics and the
codebook's update. On a machine with a GPU the fused kernel is measured there too (`quantizer_gpu`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import quantizer_gpu, quantizer_workspace
from benchmarks.harness import Bench
from benchmarks.machine import threads
from benchmarks.quantizer_check import check_codes, check_statistics
from benchmarks.quantizer_peers import Faiss, VectorQuantizePytorch, as_rows, find
from benchmarks.result import at_least
from benchmarks.timing import Contender, Race
from vqscale.models.nearest import nearest_codes
from vqscale.models.quantizer import Codebook, Donors, update_codebooks

GOALS = {
    "vs_vector_quantize_pytorch": at_least(15),
    "vs_faiss_search": at_least(0.95),
    "search_fraction_of_floor": at_least(0.80),
    "k8192_vs_vector_quantize_pytorch": at_least(18),
    **quantizer_gpu.GOALS,
}
PACKAGES = ("faiss-cpu", "vector-quantize-pytorch", "triton")

THREADS, DIM, SIZES = 2, 64, (512, 8192)
_UNIT, _CPU = "vectors/s", "vectors/CPU s"
_SIDE, _SETS = 64, 3


@dataclass(frozen=True)
class Problem:
    """A codebook and sets of latents."""

    codes: Tensor
    """fp32 [K, D]."""
    sets: Sequence[Tensor]
    """fp32 [B, D, H, W] each."""

    def endless(self) -> Iterator[Tensor]:
        """The sets in turn."""
        return itertools.cycle(self.sets)


def run(bench: Bench) -> None:
    """Measure both sizes of codebooks, the workspace and, where there is one, the GPU."""
    batch = 1 if bench.quick else 16
    bench.config |= {
        "vectors": batch * _SIDE**2,
        "dim": DIM,
        "codes": list(SIZES),
        "threads": THREADS,
        "dtype": "float32",
        "latents": "codes drawn at random plus normal noise of half their spread, mean 1",
        "vector_quantize_pytorch": "VectorQuantize(dim, codebook_size), otherwise its defaults; training, no gradient",
        "faiss": "IndexFlatL2",
    }
    with threads(THREADS):
        for size in SIZES:
            measure(bench, size, make_problem(size, batch))
        workspace(bench)
    quantizer_gpu.run(bench)


def make_problem(size: int, batch: int) -> Problem:
    """A codebook of `size` and latents around its codes."""
    generator = torch.Generator().manual_seed(size)
    codes = torch.randn(size, DIM, generator=generator) + 1
    sets = []
    for _ in range(_SETS):
        drawn = codes[torch.randint(size, (batch * _SIDE**2,), generator=generator)]
        rows = drawn + 0.5 * torch.randn(drawn.shape, generator=generator)
        sets.append(rows.view(batch, _SIDE, _SIDE, DIM).permute(0, 3, 1, 2))
    return Problem(codes, sets)


def measure(bench: Bench, size: int, problem: Problem) -> None:
    """Check and race all contenders with one codebook."""
    mark = "" if size == SIZES[0] else f"_k{size}"
    check_codes(bench, f"ours{mark}", problem, lambda rows: nearest_codes(rows, problem.codes))
    check_statistics(bench, f"ours{mark}", problem)
    contenders = [search(problem), train(problem), *peers(bench, problem, mark)]
    race = bench.race(f"{size} codes", [*contenders, product(), convolution(), copy(problem)])
    keep(bench, race, contenders, mark)
    floor(bench, race, size, mark)
    ratios(bench, race, mark)


def peers(bench: Bench, problem: Problem, mark: str) -> list[Contender]:
    """Those of the others that are installed, checked."""
    found = []
    faiss, package = find("faiss", "faiss-cpu"), find("vector_quantize_pytorch", "vector-quantize-pytorch")
    if isinstance(faiss, str):
        bench.skip("faiss", faiss)
    else:
        index = Faiss(faiss, problem.codes, THREADS)
        check_codes(bench, f"faiss{mark}", problem, index.search)
        found.append(index.contender("faiss", problem.endless()))
    if isinstance(package, str):
        bench.skip("vector_quantize_pytorch", package)
    else:
        quantize = VectorQuantizePytorch(package, problem.codes)
        check_codes(bench, f"vector_quantize_pytorch{mark}", problem, lambda rows: quantize.step(as_latents(rows)))
        found.append(quantize.contender("vector_quantize_pytorch", problem.endless()))
    return found


def as_latents(rows: Tensor) -> Tensor:
    """[N, D] as [1, D, N, 1]."""
    return rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)


def search(problem: Problem) -> Contender:
    """Codes alone, as extraction and evaluation need them."""
    source = problem.endless()
    return Contender("search", lambda: len(nearest_codes(as_rows(next(source)), problem.codes)))


def train(problem: Problem) -> Contender:
    """Codebook and update as training calls them."""
    source, latents = problem.endless(), problem.sets[0]
    book = Codebook(*problem.codes.shape)
    book.codes.copy_(problem.codes)
    donors = Donors(torch.arange(len(latents)), len(latents), seed=0)

    def work() -> float:
        found = book(next(source), donors)
        assert found.statistics is not None
        update_codebooks([book], [found.statistics], lambda summed: summed)
        return found.codes.numel()

    return Contender("train", work)


def product(side: int = 2048) -> Contender:
    """Torch's product of two square matrices; floating-point operations."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    out = torch.empty(side, side)

    def work() -> float:
        torch.mm(a, b, out=out)
        return 2 * side**3

    return Contender("product", work)


def convolution(batch: int = 16, side: int = 32, channels: int = 128) -> Contender:
    """Torch's 3×3 convolution, which has better kernels than its product on some processors."""
    image = torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)

    def work() -> float:
        with torch.no_grad():
            F.conv2d(image, kernel, padding=1)
        return 2 * batch * side**2 * channels**2 * 9

    return Contender("convolution", work)


def copy(problem: Problem) -> Contender:
    """Torch's copy of the latents; bytes read and written."""
    source, out = problem.endless(), torch.empty_like(problem.sets[0])

    def work() -> float:
        return 2 * out.copy_(next(source)).nbytes

    return Contender("copy", work)


def keep(bench: Bench, race: Race, contenders: Sequence[Contender], mark: str) -> None:
    """Keep every contender's vectors a second and a CPU second."""
    for contender in contenders:
        bench.figure(contender.name + mark, race.rates(contender.name), _UNIT)
        bench.figure(f"{contender.name}{mark}_cpu", race.cpu_rates(contender.name), _CPU)


def floor(bench: Bench, race: Race, size: int, mark: str) -> None:
    """Vectors a second that the search could reach: arithmetic or memory, whichever takes longer."""
    operations, moved = cost(size)
    best = [
        min(max(product, convolution) / operations, copied / moved)
        for product, convolution, copied in zip(*map(race.rates, ("product", "convolution", "copy")), strict=True)
    ]
    formula = (
        f"a vector takes 2·K·D = {operations:,} operations at the rate of torch's fp32 product of 2,048² matrices or "
        f"of its 3×3 convolution of 128 channels, whichever is higher, or D·4 + 8 = {moved} bytes at the rate of a "
        "copy, whichever takes longer"
    )
    bench.floor(f"search{mark}", best, _UNIT, formula)
    bench.ratio("search_fraction_of_floor" if not mark else f"{mark[1:]}_fraction_of_floor", race.rates("search"), best)


def cost(size: int) -> tuple[int, int]:
    """Operations and bytes of the search for one vector among `size` codes; the codebook stays in the cache."""
    return 2 * size * DIM, 4 * DIM + 8


def ratios(bench: Bench, race: Race, mark: str) -> None:
    """Ours against each peer that took part."""
    front = f"{mark[1:]}_" if mark else ""
    if "vector_quantize_pytorch" in race.laps:
        own, other = race.rates("train"), race.rates("vector_quantize_pytorch")
        bench.ratio(f"{front}vs_vector_quantize_pytorch", own, other)
    if "faiss" in race.laps:
        bench.ratio(f"{front}vs_faiss_search", race.rates("search"), race.rates("faiss"))


def workspace(bench: Bench) -> None:
    """The search's own memory, for four times as many vectors as are timed."""
    vectors, repeats = 4 * bench.config["vectors"], 1 if bench.quick else 3
    bench.config["workspace"] = (
        f"growth of a new process's peak memory by `assign` of {vectors:,} vectors, less its results"
    )
    for size in SIZES[:1] if bench.quick else SIZES:
        key = "workspace_mb" if size == SIZES[0] else f"workspace_k{size}_mb"
        found = []
        for done in range(repeats):
            bench.report(f"workspace, {size} codes", done, repeats)
            found.append(quantizer_workspace.measure(vectors, size, DIM, THREADS) / 1e6)
        bench.figure(key, found, "MB")
