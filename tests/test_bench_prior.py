"""The benchmarks `prior` and `sample`: formulas count right, wrong peers are found, they run; no time is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import prior, sample
from benchmarks.harness import Bench, Options, WrongResultError
from benchmarks.one_process import one_process
from benchmarks.prior_cost import Cost
from benchmarks.prior_peers import XTransformers
from benchmarks.quantizer_peers import find
from vqscale.models.network import GridShape
from vqscale.models.transformer import Transformer
from vqscale.models.transformer_block import Shape
from vqscale.models.transformer_steps import BlockSteps


def make_bench(name: str, folder: Path) -> Bench:
    module = {"prior": prior, "sample": sample}[name]
    return Bench(name, folder, Options(quick=True), module.GOALS, module.PACKAGES)


def network(side: int = 4) -> Transformer:
    torch.manual_seed(0)
    return Transformer((GridShape(side, 16),), 0, layers=2, width=32, heads=2)


def test_costs_of_the_size_that_is_known() -> None:
    """Reference figures of a prior with 6 layers of width 384 and 1,024 codes."""
    cost = Cost(Shape(6, 384, 6), 512, 1024)
    assert cost.weights == 6 * 12 * 384**2 + 384 * 512
    assert (cost.matrix_flops, cost.attention_flops) == (6 * cost.weights * 1024, 6 * 6 * 1024**2 * 384)
    assert cost.cached(0) == 2 * 6 * 384
    assert sample.step_bytes(cost, 64) == 4 * (cost.weights + 64 * 2 * 6 * 384 * 512.5)


def test_the_formula_of_the_cache_is_its_size() -> None:
    model = network()
    steps = BlockSteps(model.blocks[0], 3, model.length)  # type: ignore[arg-type]
    held = 2 * (steps._keys.numel() + steps._values.numel())
    assert held == 3 * Cost(model.shape, 16, model.length).cached(model.length - 1)


def test_operations_are_compared_with_those_counted(tmp_path: Path) -> None:
    bench = make_bench("prior", tmp_path)
    with one_process() as ranks:
        problem = prior.make_problem(True, torch.device("cpu"))
        ours = prior.Ours(problem, ranks)
        cost = Cost(ours.network.shape, prior.CODES, problem.grid.length)
        prior.check_cost(bench, ours, problem, cost)
        with pytest.raises(WrongResultError, match="flops"):
            prior.check_cost(bench, ours, problem, Cost(cost.shape, prior.CODES - 1, cost.length))


def test_a_step_without_cache_is_the_full_forward() -> None:
    model, codes = network().eval(), torch.randint(16, (2, 4, 4))
    with torch.no_grad():
        (full,) = model([], [codes], torch.zeros(2, dtype=torch.int64))
        for known in (0, 5, 15):
            logits = sample.next_logits(model, codes.flatten(1)[:, :known])
            torch.testing.assert_close(logits, full[:, known], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("flash", [True, False])
def test_a_peer_that_computes_something_else_stops_the_benchmark(tmp_path: Path, flash: bool) -> None:
    package = pytest.importorskip("x_transformers")
    bench, model, codes = make_bench("prior", tmp_path), network(), torch.randint(16, (2, 4, 4))
    torch.nn.init.normal_(model.norm.weight)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.above[0].weight)  # type: ignore[arg-type]
    peer = XTransformers(package, model, flash=flash)
    prior.check_logits(bench, "same", model, peer, codes)
    peer.decoder.attn_layers.layers[1][1].ff[0][1] = torch.nn.Identity()  # a GELU
    with pytest.raises(WrongResultError, match="other"):
        prior.check_logits(bench, "other", model, peer, codes)


def test_codes_of_another_network_stop_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, problem = make_bench("sample", tmp_path), sample.make_problem(True)
    with torch.no_grad():
        sample.check(bench, problem, None)
        monkeypatch.setattr(sample, "next_logits", lambda network, flat: -original(network, flat))
        with pytest.raises(WrongResultError, match="no_cache"):
            sample.check(bench, problem, None)


original = sample.next_logits


@pytest.mark.parametrize("name", ["prior", "sample"])
def test_it_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, bench = {"prior": prior, "sample": sample}[name], make_bench(name, tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(module, "keep_heap", lambda: asked.append("heap"))  # it would hold for all tests after
    monkeypatch.setattr(module, "THREADS", 1)
    before = torch.get_num_threads()
    module.run(bench)
    assert torch.get_num_threads() == before
    found, goals = bench.finish(), set(module.GOALS)
    assert asked or torch.cuda.is_available()
    if isinstance(find("x_transformers", "x-transformers"), str):
        assert "x_transformers" in found.skipped
        goals -= {"vs_x_transformers"}
    assert goals <= set(found.ratios)
    assert set(found.floors) == ({"products", "peak"} if name == "prior" else {"ours_1", "ours_2", "ours_3"})
    assert found.correctness
