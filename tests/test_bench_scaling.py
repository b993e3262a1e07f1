"""The benchmark `scaling`: its model against values worked out by hand, its ranks, and that it runs; never a time."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks import scaling
from benchmarks.harness import Bench, Options, WrongResultError
from benchmarks.network import cluster_of
from benchmarks.remote import Remote, RemoteError
from benchmarks.scaling_model import Cluster, Link, Step, all_reduce, fitted, half_ring, predict, ring, tree, up_to
from benchmarks.scaling_prediction import Measured, forecast
from vqscale.errors import UserError

LINK = Link(bytes_per_s=1e9, latency_s=1e-3)
CLUSTER = Cluster(4, within=Link(1e9, 1e-6), between=Link(4e8, 1e-5))
STEP = Step(compute_s=0.1, buckets=(1_000_000, 8_000_000), codebooks=400_000, window=0.5)


def test_a_ring_by_hand() -> None:
    """Four ranks, 8 MB: three rounds each way, of which each rank sends 2 MB."""
    assert half_ring(8e6, 4, LINK) == pytest.approx(3 * (1e-3 + 2e-3))
    assert ring(8e6, 4, LINK) == pytest.approx(0.018)
    assert ring(8e6, 1, LINK) == 0


def test_trees_by_hand() -> None:
    """Eight ranks: three levels, up and down, two latencies each; bytes as in a ring."""
    assert tree(8e6, 8, LINK) == pytest.approx(12e-3 + 14e-3)
    assert tree(8e6, 5, LINK) == pytest.approx(12e-3 + 12.8e-3)


def test_nodes_by_hand() -> None:
    """Two nodes of four: 6 MB a GPU in and out of the node's ring, then 2 MB a GPU over a quarter of the adapters."""
    inside = 2 * (3e-6 + 0.75 * 8e6 / 1e9)
    between = 2 * (1e-5 + 0.5 * 2e6 / 1e8)
    assert all_reduce(8e6, 8, CLUSTER) == pytest.approx(inside + between)
    assert all_reduce(8e6, 4, CLUSTER) == pytest.approx(inside), "one node is one ring"
    assert all_reduce(8e6, 2, CLUSTER) == pytest.approx(2 * (1e-6 + 4e-3))
    trees = replace(CLUSTER, trees=True)
    assert all_reduce(8e6, 16, trees) == pytest.approx(inside + 8e-5 + 2 * 0.75 * 2e6 / 1e8)
    with pytest.raises(ValueError, match="do not fill nodes of 4"):
        all_reduce(8e6, 6, CLUSTER)


def test_a_step_by_hand() -> None:
    """On four GPUs the first bucket hides; the last and the codebooks do not."""
    found = predict(STEP, 4, CLUSTER)
    assert found.gradients_s == pytest.approx(6e-6 + 1.5 * 8e6 / 1e9)
    assert found.codebooks_s == pytest.approx(6e-6 + 1.5 * 4e5 / 1e9)
    assert found.step_s == pytest.approx(0.1 + 0.012606 + 0.000006)
    assert found.efficiency == pytest.approx(0.1 / 0.112612)
    assert found.codebook_share == pytest.approx(0.000606 / 0.112612)
    exposed = predict(replace(STEP, window=0.0), 4, CLUSTER)
    assert exposed.gradients_s - found.gradients_s == pytest.approx(6e-6 + 1.5 * 1e6 / 1e9)
    half = predict(replace(STEP, window=0.0075), 4, CLUSTER)  # 0.75 ms of the first bucket's 1.506 hide
    assert half.gradients_s - found.gradients_s == pytest.approx(0.000756)
    assert predict(STEP, 1, CLUSTER).efficiency == 1


def test_a_link_is_found_from_two_sizes() -> None:
    link = fitted(ring(0, 2, LINK), ring(5e6, 2, LINK), 5_000_000)
    assert link is not None
    assert (link.bytes_per_s, link.latency_s) == (pytest.approx(1e9), pytest.approx(1e-3))
    assert fitted(2.0, 1.0, 5) is None
    noisy = made_up(None)
    noisy = replace(noisy, reduce_s={**noisy.reduce_s, ("large", 2): 0.0})
    assert forecast(noisy, CLUSTER, "a test").compared == {}, "nothing is said of this machine"


def test_numbers_of_gpus_fill_nodes() -> None:
    assert list(up_to(1024, 8)) == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert list(up_to(100, 4)) == [4, 8, 16, 32, 64]


def made_up(gpu_step_s: float | None) -> Measured:
    """A machine of two cores that is exactly as the model says."""
    sizes = {"small": 0, "codebooks": 400_000, "gradients": 9_000_000, "large": 5_000_000}
    here = {2: Cluster(2, LINK, LINK), 4: Cluster(4, LINK.shared(2), LINK)}
    reduce_s = {
        (what, world): all_reduce(size, world, one) for what, size in sizes.items() for world, one in here.items()
    }
    alone = {"one": 0.5, "pair": 0.6, "quartet": 1.2}
    step = Step(0, STEP.buckets, STEP.codebooks)
    trained = {
        name: predict(replace(step, compute_s=alone[by]), world, here[world]).step_s
        for name, by, world in (("two", "pair", 2), ("four", "quartet", 4))
    }
    return Measured({**alone, **trained}, reduce_s, sizes, STEP.buckets, 2, gpu_step_s)


def test_the_forecast_compares_itself_with_this_machine() -> None:
    found = forecast(made_up(None), CLUSTER, "a test")
    assert set(found.compared) == {f"{what}_{world}" for what in ("codebooks", "gradients", "step") for world in (2, 4)}
    assert all(abs(one.off) < 1e-9 for one in found.compared.values())
    assert any("assumed, not measured" in line for line in found.assumptions)
    assert found.inputs["gpu_step_s"] == pytest.approx(128 / 12_000)


def test_a_measured_gpu_is_what_is_predicted_from() -> None:
    found = forecast(made_up(0.1), CLUSTER, "a test")
    assert found.inputs["gpu_step_s"] == 0.1
    points = dict(found.curves["efficiency"].points)
    assert points[8] == pytest.approx(predict(replace(STEP, window=2 / 3), 8, CLUSTER).efficiency)
    assert list(points) == [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert sorted(points.values(), reverse=True) == list(points.values()), "more nodes are never better"
    assert not any("assumed, not measured" in line for line in found.assumptions)


def test_networks_come_from_profiles(tmp_path: Path) -> None:
    default, source = cluster_of(None)
    assert default.gpus_per_node == 8
    assert "defaults" in source
    path = tmp_path / "mine.yaml"
    nodes = "slurm: {gpus_per_node: 4, cpus_per_task: 8, lead_s: 240}"
    text = f"name: mine\nbackend: slurm\n{nodes}\nnetwork: {{between_gb_s: 25}}\n"
    path.write_text(text)
    mine, source = cluster_of(str(path))
    assert (mine.gpus_per_node, mine.between.bytes_per_s, mine.within) == (4, 25e9, default.within)
    assert source == "profile mine: its section `network`"
    assert "does not have" in cluster_of("local")[1]
    with pytest.raises(UserError, match="no profile 'locl'"):
        cluster_of("locl")
    path.write_text(text.replace("between_gb_s", "betwen_gb_s"))
    with pytest.raises(UserError, match=r"did you mean 'network\.between_gb_s'"):
        cluster_of(str(path))


def echo(body: str) -> list[str]:
    return [sys.executable, "-c", f"from benchmarks.remote import serve\n{body}"]


def test_a_program_answers_until_it_is_closed() -> None:
    with Remote(echo("def answer(q):\n    print('noise')\n    return {'twice': 2 * q['n']}\nserve(answer)")) as program:
        assert program.ask(n=4) == {"twice": 8}
        with pytest.raises(RemoteError, match="KeyError: 'n'"):
            program.ask(m=1)
        assert program.ask(n=5) == {"twice": 10}


def test_a_program_that_ends_leaves_its_last_words() -> None:
    with (
        Remote(echo("import sys\nsys.exit('no room')")) as program,
        pytest.raises(RemoteError, match="exit code 1: no room"),
    ):
        program.ask(n=1)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("scaling", tmp_path, Options(quick=True), scaling.GOALS, scaling.PACKAGES)


@pytest.mark.dist
def test_it_runs(bench: Bench) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    scaling.run(bench)
    found = bench.finish()
    assert set(scaling.GOALS) <= set(found.ratios)
    assert found.correctness["one_for_codebooks_2"].value == found.correctness["one_for_codebooks_4"].value == 0
    assert found.correctness["codebooks_4"].value == 0
    assert {"one", "pair", "quartet", "two", "four", "threads"} <= set(found.races["steps and collectives"])
    assert found.prediction is not None
    assert 1024 in dict(found.prediction.curves["efficiency"].points)
    assert {child.pid for child in psutil.Process().children(recursive=True)} == before, "no rank is left"


@pytest.mark.dist
@pytest.mark.fault
def test_a_rank_that_dies_ends_it() -> None:
    with Remote([sys.executable, "-m", "benchmarks.scaling_ranks"]) as host:
        groups = scaling.Groups(host, scaling.SMALL, 1)
        groups.start("two", 2)
        (program,) = [one for one in psutil.Process().children() if "benchmarks.scaling_ranks" in one.cmdline()]
        ranks = program.children()
        os.kill(ranks[1].pid, signal.SIGKILL)
        with pytest.raises(RemoteError, match=r"a rank was killed|rank 0 of 2"):
            groups.ask("two", do="steps", times=1)
    assert not [rank for rank in ranks if rank.is_running()]


def test_ranks_that_disagree_are_not_timed(bench: Bench) -> None:
    """Two collectives for the codebooks, or codebooks that differ: as ranks would report it."""

    class Ranks(scaling.Groups):
        def __init__(self, looks: list[dict[str, object]]) -> None:
            self.looks = looks

        def ask(self, *names: str, **question: object) -> list[dict[str, object]]:  # type: ignore[override]
            return self.looks if question["do"] == "look" else [{"loss": 1.0}]

    def look(books: str, *sizes: int) -> dict[str, object]:
        seen = [["allreduce_", size] for size in sizes]
        return {"collectives": seen, "gradients": 900, "statistics": 40, "codebooks": books}

    assert scaling.check(bench, Ranks([look("a", 300, 600, 40)] * 2)) == ((300, 600), 40)
    for looks, what in (
        ([look("a", 900, 40), look("b", 900, 40)], "codebooks differ"),
        ([look("a", 900, 20, 20)] * 2, "beside the gradients"),
        ([look("a", 900, 60)] * 2, "exactly one"),
        ([look("a", 900, 40), look("a", 500, 400, 40)], "as the others"),
    ):
        with pytest.raises(WrongResultError, match=what):
            scaling.check(bench, Ranks(looks))
