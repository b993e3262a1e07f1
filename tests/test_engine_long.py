"""Every strategy for 200 steps in every mode, and compiled ones; part of `make test-slow`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine_runs import STRATEGIES, Trained, joined, same, tokenizer_recipe, train_tokenizer
from tests.ranks import run_ranks
from tests.training_helpers import clock_run, many_streams

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LONG = 200
MODES = [
    {"precision": precision, "micro_batch": micro, "checkpoint_activations": recomputed}
    for precision, micro, recomputed in itertools.product(("fp32", "bf16"), (None, 4), (False, True))
]


def train_all(run: Path, strategy: str, modes: list[dict[str, Any]], steps: int) -> list[Trained]:
    with joined() as ranks:
        return [train_tokenizer(ranks, run, tokenizer_recipe(strategy, steps=steps, **mode)) for mode in modes]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clock_run(tmp_path_factory.mktemp("long") / "run", **many_streams())


@pytest.fixture(scope="module")
def by_ddp(run: Path) -> list[list[Trained]]:
    return run_ranks(2, train_all, run, "ddp", MODES, LONG, timeout=1200)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_long_trainings_agree(run: Path, by_ddp: list[list[Trained]], strategy: str) -> None:
    """Single codes part ways after many steps, so what is compared is where the training ends, over 20 steps."""
    found = by_ddp if strategy == "ddp" else run_ranks(2, train_all, run, strategy, MODES, LONG, timeout=1200)
    expected = np.mean(by_ddp[0][0].losses[-20:])
    for mode, *ranks in zip(MODES, *found, strict=True):
        first, second = ranks
        assert same(first.codebooks, second.codebooks), mode
        assert first.restarts > 20, mode
        assert np.isfinite(first.losses).all(), mode
        assert np.mean(first.losses[-20:]) == pytest.approx(expected, rel=0.1), mode
        assert expected < 0.8 * first.losses[0], mode


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2"])
def test_compiled_trainings_agree(run: Path, strategy: str) -> None:
    modes = [{}, {"compile": True}, {"compile": True, "checkpoint_activations": True}]
    eager, *compiled = run_ranks(2, train_all, run, strategy, modes, 6, timeout=1200)[0]
    for found in compiled:
        np.testing.assert_allclose(found.losses, eager.losses, rtol=1e-3)
