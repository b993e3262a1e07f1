"""The benchmark `checkpoint`: it compares what it says, and it runs; what it measures is never asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint
from benchmarks.harness import Bench, Options, WrongResultError
from vqscale.training.checkpoints.staging import Staging


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("checkpoint", tmp_path, Options(quick=True), checkpoint.GOALS, checkpoint.PACKAGES)


def test_it_runs(bench: Bench) -> None:
    checkpoint.run(bench)
    found = bench.finish()
    assert set(found.ratios) == {"async_stall_fraction", "blocking_fraction_of_floor", "blocking_vs_torch_dcp"}
    assert {"stall_s", "blocking_s", "async_write_s", "torch_dcp_s", "blocking_rate"} == set(found.figures)
    assert {"plain_s", "copy_s"} == set(found.floors)
    assert found.correctness["async"].value == found.correctness["blocking"].value == 0
    assert all(figure.n == 2 for figure in found.figures.values())
    assert not torch.distributed.is_initialized()


def test_a_save_of_something_else_stops_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if staging had not ended when training went on."""
    fill = Staging.fill

    def late(staging: Staging, plan: object, state: dict[str, object]) -> memoryview:
        state["model/heads.0.weight"].pieces[0].local.add_(1)  # type: ignore[attr-defined]
        return fill(staging, plan, state)  # type: ignore[arg-type]

    monkeypatch.setattr(Staging, "fill", late)
    with pytest.raises(WrongResultError, match="tensors that differ"):
        checkpoint.run(bench)


def test_file_systems_are_named(tmp_path: Path) -> None:
    assert checkpoint.filesystem(Path("/proc/self")) == "proc"
    assert checkpoint.filesystem(tmp_path)
