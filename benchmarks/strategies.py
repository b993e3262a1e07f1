"""Time and state of a training step under every strategy: `torchrun --nproc-per-node 2 -m benchmarks.strategies`.

All strategies train the same tokenizer in one process, a few steps each in turn and again, so that other work on the
machine falls on all of them alike. Rank 0 prints medians, and the ratio to DDP in the same round. It is no
bench of `vqscale bench`, since it needs ranks.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from vqscale.config.training import Training
from vqscale.models.convnets import Widths
from vqscale.models.quantizer import Codebook
from vqscale.models.vqvae import VQVAE, LevelShape
from vqscale.training.distributed import Ranks, process_group
from vqscale.training.engine import STRATEGIES, Engine


def main() -> None:
    """Measure, and print a line a strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="of a strategy in a round; the first two do not count")
    parser.add_argument("--batch", type=int, default=8, help="images of a rank")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    with process_group() as ranks:
        training = Training(steps=10**6, global_batch=options.batch * ranks.world, learning_rate=1e-4)
        images = torch.rand(options.batch, 3, options.size, options.size, device=ranks.device)
        seconds: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
        for _ in range(options.rounds):
            for strategy, found in seconds.items():
                engine = _engine(strategy, training, ranks, options.hidden)
                times = [_time(engine, images, number) for number in range(options.steps)]
                found.append(statistics.median(times[2:]))
                held = sum(piece.local.nbytes for piece in engine.pieces()) / 2**20
                if ranks.first and len(found) == options.rounds:
                    _report(strategy, found, seconds["ddp"], held)


def _engine(strategy: str, training: Training, ranks: Ranks, hidden: int) -> Engine:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()  # Accelerate keeps one kind of parallelism for the life of a process
    torch.manual_seed(0)
    widths = Widths(hidden, 2, hidden // 2)
    model = VQVAE([Codebook(512, 64), Codebook(512, 64)], [LevelShape(4, widths), LevelShape(2, widths)])
    return Engine(model, training, ranks, strategy)


def _time(engine: Engine, images: Tensor, number: int) -> float:
    """Seconds of a step."""
    engine.ranks.barrier()
    began = time.perf_counter()
    with engine.accumulating(last=True):
        engine.backward(F.mse_loss(engine.model(images).images, images))
    engine.optimise(number)  # reads the norm, so that a GPU has finished
    return time.perf_counter() - began


def _report(strategy: str, seconds: list[float], by_ddp: list[float], held: float) -> None:
    ratios = [mine / its for mine, its in zip(seconds, by_ddp, strict=True)]
    print(
        f"{strategy:6} {1e3 * statistics.median(seconds):7.1f} ms a step, x{statistics.median(ratios):.2f} of ddp "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {held:.1f} MiB of weights, codebooks and moments on a rank",
        flush=True,
    )


if __name__ == "__main__":
    main()
