"""Checkpoints of real trainings: what one strategy wrote, every other takes over at every number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine_runs import HALF, STRATEGIES, full, joined, same, tokenizer_recipe, walk
from tests.ranks import run_ranks
from tests.training_helpers import clock_run, many_streams, tokenizer_experiment
from vqscale.training.checkpoints.reader import require
from vqscale.training.distributed import Ranks

pytestmark = pytest.mark.dist


def write(run: Path, root: Path) -> dict[str, bool]:
    """Train some steps under every strategy and save behind them."""
    with joined() as ranks:
        for strategy in STRATEGIES:
            made = tokenizer_experiment(ranks, run, tokenizer_recipe(strategy))
            walk(made, made.batches(HALF))
            made.checkpoints(root / strategy).save(made.task, HALF, final=True)
        return read_all(run, root, ranks)


def read(run: Path, root: Path) -> dict[str, bool]:
    with joined() as ranks:
        return read_all(run, root, ranks)


def read_all(run: Path, root: Path, ranks: Ranks) -> dict[str, bool]:
    """Take over every checkpoint under every strategy; whether every bit is as in the file, and one step can follow."""
    found = {}
    for strategy in STRATEGIES:
        for other in STRATEGIES:
            made = tokenizer_experiment(ranks, run, tokenizer_recipe(strategy), weights=99)
            assert made.checkpoints(root / other).resume(made.task)[0] == HALF
            stored, got = require(root / other, "tokenizer").tensors(), full(made)
            rest = {name for name in stored.keys() - got.keys() if not name.startswith("extra/")}
            found[f"{other} to {strategy}"] = not rest and same(got, {name: stored[name] for name in got})
        walk(made, made.batches(1, HALF))
    return found


def test_every_strategy_reads_every_other_at_every_number_of_ranks(tmp_path: Path) -> None:
    run = clock_run(tmp_path / "run", **many_streams())
    pairs = {f"{one} to {other}": True for one in STRATEGIES for other in STRATEGIES}
    assert run_ranks(2, write, run, tmp_path / "2", timeout=300) == [pairs] * 2
    assert run_ranks(1, read, run, tmp_path / "2", timeout=300) == [pairs]
    assert run_ranks(3, read, run, tmp_path / "2", timeout=300) == [pairs] * 3
    prints = {require(tmp_path / "2" / strategy, "tokenizer").stored.manifest.strategy for strategy in STRATEGIES}
    assert prints == set(STRATEGIES)
