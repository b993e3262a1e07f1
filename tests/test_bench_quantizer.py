"""The benchmark `quantizer`: it compares what it says, and it runs; what it measures is never asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import quantizer, quantizer_gpu
from benchmarks.harness import Bench, Options, WrongResultError
from benchmarks.quantizer_check import check_codes, excess
from benchmarks.quantizer_peers import as_rows, find
from vqscale.models.nearest import nearest_codes


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A quick one; everything small."""
    monkeypatch.setattr(quantizer, "SIZES", (16, 40))
    monkeypatch.setattr(quantizer, "_SIDE", 16)
    monkeypatch.setattr(quantizer, "product", lambda: quantizer.Contender("product", lambda: 1.0))
    return Bench("quantizer", tmp_path, Options(quick=True), quantizer.GOALS, quantizer.PACKAGES)


def test_the_floor_counts_what_torch_counts() -> None:
    z, codes = torch.randn(7, quantizer.DIM), torch.randn(512, quantizer.DIM)
    with FlopCounterMode(display=False) as counter:
        z @ codes.T
    assert counter.get_total_flops() == 7 * quantizer.cost(512)[0]


def test_rows_are_views_of_latents_around_the_codes() -> None:
    problem = quantizer.make_problem(16, 2)
    for latents in problem.sets:
        assert latents.is_contiguous(memory_format=torch.channels_last)
        rows = as_rows(latents)
        assert rows.data_ptr() == latents.data_ptr()
        assert torch.equal(quantizer.as_latents(rows)[0, :, :, 0].T, rows)
    assert torch.bincount(nearest_codes(rows, problem.codes), minlength=16).min() > 0


def test_a_wrong_code_stops_the_benchmark(bench: Bench) -> None:
    problem = quantizer.make_problem(16, 1)
    check_codes(bench, "ours", problem, lambda rows: nearest_codes(rows, problem.codes))
    with pytest.raises(WrongResultError, match="ours_codes"):
        check_codes(bench, "ours", problem, lambda rows: (nearest_codes(rows, problem.codes) + 1) % 16)


def test_excess_is_by_how_much_a_code_is_not_the_nearest() -> None:
    codes = torch.tensor([[1.0], [-1.0]])
    z = torch.tensor([[0.5]])
    assert excess(z, codes, torch.tensor([0])) == 0
    assert excess(z, codes, torch.tensor([1])) == pytest.approx((1.5**2 - 0.5**2) / 1.5**2)


def test_peers_that_are_missing_are_named() -> None:
    assert find("no_such_module", "no-such-package") == (
        "cannot be imported (No module named 'no_such_module'); pip install no-such-package"
    )


def test_it_runs(bench: Bench) -> None:
    before = torch.get_num_threads()
    quantizer.run(bench)
    assert torch.get_num_threads() == before
    found = bench.finish()
    for peer, ratios in {
        "faiss": ("vs_faiss_search", "k40_vs_faiss_search"),
        "vector_quantize_pytorch": ("vs_vector_quantize_pytorch", "k40_vs_vector_quantize_pytorch"),
    }.items():
        assert (peer in found.skipped) != (set(ratios) <= set(found.ratios))
    assert {"search", "train", "search_k40", "train_k40", "workspace_mb"} <= set(found.figures)
    assert {"search", "search_k40"} == set(found.floors) - {"gpu_search"}
    assert {"ours_codes", "ours_counts", "ours_sums", "ours_k40_codes"} <= set(found.correctness)
    assert ("gpu" in found.skipped) != torch.cuda.is_available()


def test_the_part_for_gpus_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_gpu, "_REPEATS", 1)
    quantizer_gpu.measure(bench, torch.device("cpu"), 4_096)
    found = bench.finish()
    assert {"gpu_search", "gpu_train", "gpu_train_bf16", "gpu_eager"} == set(found.figures)
    assert set(found.ratios) == {"gpu_vs_eager", "gpu_fraction_of_floor"}
    z, codes = torch.randn(100, 8), torch.randn(5, 8)
    assert torch.equal(quantizer_gpu.eager(z, codes)[0], nearest_codes(z, codes))
