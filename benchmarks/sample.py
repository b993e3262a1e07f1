"""Benchmark `sample`: codes drawn from a transformer, against the loop without a cache and x-transformers' generate.

The network is that of benchmark `prior` on a CPU: 6 layers of width 384, one grid of 32×32 codes. The floor is reading
the weights and the filled part of the cache once for each position. Drawing is by temperature 1 from all codes; before
anything is timed, the likeliest codes of all are compared. It runs on two threads of the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench
from benchmarks.machine import threads
from benchmarks.prior_cost import Cost
from benchmarks.prior_peers import XTransformers
from benchmarks.quantizer_peers import find
from benchmarks.result import at_least
from benchmarks.timing import Contender, Race
from vqscale.config.prior import BlockwiseNetwork, MaskedNetwork, Network, TransformerNetwork, UniformNetwork
from vqscale.config.recipe import Prior as Settings
from vqscale.config.training import Training
from vqscale.models.generate import Draws, Sampling, draw
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior
from vqscale.models.transformer import Transformer
from vqscale.models.transformer_steps import Decoder, Walk
from vqscale.training.build import build_prior
from vqscale.training.heap import keep_heap

GOALS = {
    "vs_no_cache": at_least(30),
    "vs_x_transformers": at_least(1.25),
    "fraction_of_floor": at_least(0.70),
    "parallel_bottom_vs_autoregressive": at_least(3),
    "blockwise_bottom_vs_autoregressive": at_least(3),
    "wave_bottom_vs_autoregressive": at_least(3),
}
PACKAGES = ("x-transformers",)

THREADS, CODES = 2, 512
BATCHES = (1, 16, 64)
_UNIT = "codes/s"
_STRETCHES = 4
"""Places at which a part of the sequence stands for all of it: the middles of as many equal parts."""
_LONGEST = 16
"""Positions of such a stretch, where there is a cache; where there is none, one."""
_READ_MB = 512
_TIES, _GREEDY = 0.005, 64
"""Where two codes are equally likely, rounding decides, and all codes after are others: so the first are compared."""


@dataclass(frozen=True)
class Problem:
    """What is drawn from, and how much."""

    prior: Prior
    """A transformer over one grid."""
    pair: Mapping[str, Prior]
    """Two levels: the coarser one uniform, the finer one by a network of each way of drawing."""
    batches: Sequence[int]

    @property
    def network(self) -> Transformer:
        """The one of `prior`."""
        network = self.prior.networks[0]
        assert isinstance(network, Transformer)
        return network

    @property
    def middle(self) -> int:
        """The batch at which others take part."""
        return self.batches[1]


def run(bench: Bench) -> None:
    """Check and race."""
    keep_heap()  # as stages do
    with threads(1 if bench.quick else THREADS), torch.no_grad():
        problem = make_problem(bench.quick)
        cost = Cost(problem.network.shape, CODES, problem.prior.length)
        describe(bench, problem, cost)
        found = find("x_transformers", "x-transformers")
        if isinstance(found, str):
            bench.skip("x_transformers", found)
        peer = None if isinstance(found, str) else XTransformers(found, problem.network, flash=True)
        check(bench, problem, peer)
        few, middle, many = problem.batches
        contenders = [
            stretches(f"ours_{few}", problem.network, few),
            drawing(f"ours_{middle}", problem.prior, middle),
            stretches(f"ours_{many}", problem.network, many),
            no_cache(problem),
        ]
        if peer:
            contenders.append(generating(peer, problem))
        contenders += [drawing(name, prior, 1) for name, prior in problem.pair.items()]
        race = bench.race("drawing", [*contenders, reading(bench.quick)])
    keep(bench, race, [contender.name for contender in contenders])
    ratios(bench, race, problem, cost)


def make_problem(quick: bool) -> Problem:
    """Untrained networks."""
    small = {"layers": 1, "width": 32, "heads": 2}
    sizes: dict[str, Any] = small if quick else {"size": "S"}
    side = 4 if quick else 32
    section, uniform = TransformerNetwork(**sizes), UniformNetwork(kind="uniform")
    masked, blockwise = MaskedNetwork(kind="masked", **sizes), BlockwiseNetwork(kind="blockwise", **sizes)
    wave = BlockwiseNetwork(kind="blockwise", order="wave", **sizes)
    fine, coarse = GridShape(side, CODES), GridShape(side // 2, CODES)
    torch.manual_seed(0)
    return Problem(
        _prior([fine], section),
        {
            "bottom_autoregressive": _prior([coarse, fine], uniform, section),
            "bottom_parallel": _prior([coarse, fine], uniform, masked),
            "bottom_blockwise": _prior([coarse, fine], uniform, blockwise),
            "bottom_wave": _prior([coarse, fine], uniform, wave),
        },
        (1, 2, 3) if quick else BATCHES,
    )


def _prior(grids: Sequence[GridShape], *networks: Network) -> Prior:
    training = Training(steps=1, global_batch=1, learning_rate=1.0)
    return build_prior(Settings(networks=networks, training=training), grids, 0).eval()


def describe(bench: Bench, problem: Problem, cost: Cost) -> None:
    """Sizes and choices."""
    shape, coarse = cost.shape, problem.pair["bottom_parallel"].grids[0]
    bench.config |= {
        "layers": shape.layers,
        "width": shape.width,
        "heads": shape.heads,
        "matrix_weights": cost.weights,
        "codes": CODES,
        "length": cost.length,
        "batches": list(problem.batches),
        "batch_of_others": problem.middle,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "sampling": "temperature 1, nothing cut off, no guidance",
        "stretches": f"batches but {problem.middle}: {_STRETCHES} stretches of {stretch(cost.length)} positions spread "
        "evenly, each over a cache up to there; setting up is not timed",
        "no_cache": f"a forward of the codes so far for each code, timed at {_STRETCHES} positions spread evenly",
        "x_transformers": "TransformerWrapper of equal layers, attn_flash, AutoregressiveWrapper.generate, no filter",
        "bottom": f"batch 1; as many codes again below {coarse.length} that are drawn uniformly; `parallel` is masked "
        "prediction in 8 passes, `blockwise` the block-autoregressive transformer in as many, `wave` the same in "
        f"{3 * problem.prior.grids[0].side - 2} passes, those of the order `wave`",
    }


def check(bench: Bench, problem: Problem, peer: XTransformers | None) -> None:
    """The same codes from all when the likeliest is taken."""
    batch, network, grid = 2, problem.network, problem.prior.grids[0]
    if peer:
        peer.take(network)  # and leaves out of ours what the peer does not have
    classes, seeds = _samples(problem.prior, batch)
    (ours,) = problem.prior.generate(classes, seeds, Sampling(top_k=1))
    flat = ours.flatten(1)
    _same(bench, "a full forward", network([], [ours], classes)[0].argmax(2), flat, _TIES)
    for position in positions(grid.length):
        _same(bench, f"no cache at {position}", next_logits(network, flat[:, :position]).argmax(1), flat[:, position])
    if peer:
        first = flat[:, :_GREEDY]
        _same(bench, "x_transformers", peer.generate(batch, first.shape[1], temperature=0.0), first)


def _same(bench: Bench, who: str, theirs: Tensor, ours: Tensor, at_most: float = 0.0) -> None:
    differing = float((ours != theirs).float().mean())
    what = f"share of the likeliest codes of {who} that differ from ours, for the same codes before"
    bench.check(f"greedy_{who.replace(' ', '_')}", what, differing, at_most)


def next_logits(network: Transformer, flat: Tensor) -> Tensor:
    """Logits [B, K] of the code behind codes int64 [B, t], from a forward of no more than these."""
    (grid,), known = network.grids, flat.shape[1]
    codes = F.pad(flat, (0, grid.length - known)).view(-1, grid.side, grid.side)
    x = network.embed([], [codes], torch.full((len(flat),), network.no_class))[:, : known + 1]
    for block in network.blocks:
        x = block(x, None)
    logits: Tensor = network.heads[0](network.norm(x[:, -1]))
    return logits


def _samples(prior: Prior, batch: int) -> tuple[Tensor, list[int]]:
    return torch.full((batch,), prior.no_class), list(range(batch))


def drawing(name: str, prior: Prior, batch: int) -> Contender:
    """Ours: all codes of a batch."""
    classes, seeds = _samples(prior, batch)

    def work() -> float:
        grids = prior.generate(classes, seeds, Sampling())
        return grids[-1].numel()

    return Contender(name, work)


def stretches(name: str, network: Transformer, batch: int) -> Contender:
    """Ours: some positions of a batch, whose mean is that of all, as is the mean of what they cost."""
    length = network.length
    draws = Draws(Sampling(), list(range(batch)), torch.device("cpu"))
    decoder = Decoder(network, torch.full((batch,), network.no_class))
    walk = Walk(decoder, draws, torch.full((batch, length), -1))

    def work() -> float:
        for middle in positions(length):
            start = middle - stretch(length) // 2
            walk.level(0, start, start + stretch(length))
        return batch * _STRETCHES * stretch(length)

    return Contender(name, work)


def stretch(length: int) -> int:
    """Positions of a stretch: at most half of the part that it stands for."""
    return min(_LONGEST, length // (2 * _STRETCHES))


def generating(peer: XTransformers, problem: Problem) -> Contender:
    """The peer's own loop with its own cache."""
    batch, length = problem.middle, problem.prior.length

    def work() -> float:
        return peer.generate(batch, length, filter_logits_fn=lambda logits: logits).numel()

    return Contender("x_transformers", work)


def positions(length: int) -> list[int]:
    """The middles of equal parts of the sequence."""
    return [(2 * part + 1) * length // (2 * _STRETCHES) for part in range(_STRETCHES)]


def no_cache(problem: Problem) -> Contender:
    """A forward of all codes so far for each code, at some positions."""
    network, batch, length = problem.network, problem.middle, problem.prior.length
    codes = torch.randint(CODES, (batch, length))
    uniforms = torch.rand(batch, dtype=torch.float64)

    def work() -> float:
        for position in positions(length):
            draw(next_logits(network, codes[:, :position]), uniforms, Sampling())
        return batch * _STRETCHES

    return Contender("no_cache", work)


def reading(quick: bool) -> Contender:
    """Torch's sum over memory that no cache holds; bytes read."""
    memory = torch.ones((8 if quick else _READ_MB) * 2**18)

    def work() -> float:
        memory.sum()
        return memory.nbytes

    return Contender("reading", work)


def keep(bench: Bench, race: Race, names: Sequence[str]) -> None:
    """Every contender's codes a second."""
    for name in names:
        bench.figure(name, race.rates(name), _UNIT)


def ratios(bench: Bench, race: Race, problem: Problem, cost: Cost) -> None:
    """Ours against the others at one batch, and against the floor at all."""
    ours = race.rates(f"ours_{problem.middle}")
    for name in ("no_cache", "x_transformers"):
        if name in race.laps:
            bench.ratio(f"vs_{name}", ours, race.rates(name))
    for name in ("parallel", "blockwise", "wave"):
        one_by_one = race.rates("bottom_autoregressive")
        bench.ratio(f"{name}_bottom_vs_autoregressive", race.rates(f"bottom_{name}"), one_by_one)
    for batch in problem.batches:
        floor = [batch * bandwidth / step_bytes(cost, batch) for bandwidth in race.rates("reading")]
        formula = (
            f"the {cost.weights:,} weights of the matrices and the cache of {batch} sequences up to each position, in "
            "fp32, read once at the rate of a sum over memory"
        )
        bench.floor(f"ours_{batch}", floor, _UNIT, formula)
        mark = "" if batch == problem.batches[-1] else f"_batch{batch}"
        bench.ratio(f"fraction_of_floor{mark}", race.rates(f"ours_{batch}"), floor)


def step_bytes(cost: Cost, batch: int) -> float:
    """Bytes that are read for one position, on average over the sequence; fp32."""
    cached = sum(cost.cached(position) for position in range(cost.length)) / cost.length
    return 4 * (cost.weights + batch * cached)
