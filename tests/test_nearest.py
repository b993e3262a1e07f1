import multiprocessing
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import quantizer_workspace
from vqscale.models import nearest, nearest_cpu, nearest_tiled
from vqscale.models.nearest import Assignment, assign, nearest_codes, tie_margin
from vqscale.models.nearest_cpu import COLUMNS, ROWS
from vqscale.models.workers import single_core_threads

PARTS = ("codes", "vectors", "distance", "error", "counts", "sums")


def cloud(n: int, k: int, d: int, offset: float = 0.0, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + k + d)
    return tuple(torch.randn(rows, d, generator=generator) * spread + offset for rows in (n, k))  # type: ignore[return-value]


def excess(z: Tensor, codes: Tensor, found: Tensor) -> Tensor:
    """How much further in fp64 than the nearest the found codes are, relative to (|z - c| + |e - c|)²."""
    z, codes = z.double(), codes.double()
    distance = torch.cdist(z, codes, compute_mode="donot_use_mm_for_euclid_dist").square()
    least, true = distance.min(dim=1)
    centre = codes.mean(dim=0)
    lengths = (codes - centre).norm(dim=1)
    size = ((z - centre).norm(dim=1) + torch.maximum(lengths[found], lengths[true])).square()
    return (distance.gather(1, found[:, None])[:, 0] - least) / size


def same(a: Assignment, b: Assignment) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in PARTS)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("offset", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("d", [1, 2, 3, 16, 33, 64, 100, 256])
@pytest.mark.parametrize("k", [2, 17, COLUMNS, COLUMNS + 1, 16_384])
def test_no_code_is_nearer_beyond_the_stated_margin(k: int, d: int, offset: float) -> None:
    z, codes = cloud(300 if k < 1000 else 60, k, d, offset)
    assert excess(z, codes, nearest_codes(z, codes)).max() <= tie_margin(d)


@pytest.mark.parametrize(("n", "k", "d"), [(2 * ROWS + 5, 512, 64), (ROWS, 8192, 64), (3000, 100, 8)])
def test_equals_fp64_outside_ties_of_a_millionth(n: int, k: int, d: int) -> None:
    """The margin is for the worst case; what is seen is ten times better."""
    z, codes = cloud(n, k, d, 1.0, spread=1.0)
    assert excess(z, codes, nearest_codes(z, codes)).max() < 1e-6
    two = torch.cdist(z.double(), codes.double()).square().topk(2, largest=False)
    clear = two.values[:, 1] - two.values[:, 0] > 1e-5 * two.values[:, 1]
    assert clear.float().mean() > 0.99
    assert torch.equal(nearest_codes(z, codes)[clear], two.indices[clear, 0])


def test_near_ties_are_within_the_margin() -> None:
    z, codes = cloud(2000, 64, 32, 3.0)
    close = torch.cat([codes, codes * (1 + 1e-7), codes + 3e-7])
    found = nearest_codes(z, close)
    assert excess(z, close, found).max() <= tie_margin(32)
    assert torch.equal(found % 64, nearest_codes(z, codes))


@pytest.mark.parametrize("k", [3, 100, COLUMNS, COLUMNS + 3, 3 * COLUMNS])
def test_of_equal_codes_the_lowest_is_taken(k: int) -> None:
    z, codes = cloud(500, k, 24)
    assert torch.equal(nearest_codes(z, torch.cat([codes, codes, codes])), nearest_codes(z, codes))


def test_ties_go_to_the_lowest_index() -> None:
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest_codes(torch.tensor([[0.0, 3.0], [2.0, 0.0]]), codes).tolist() == [0, 0]


@pytest.mark.parametrize("way", [nearest_cpu.assign, nearest_tiled.assign])
@pytest.mark.parametrize("n", [0, 1, 63, ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_known_with_the_codes(way, n: int, dtype: torch.dtype) -> None:
    z, codes = cloud(n, 40, 12, 0.5)
    z = z.to(dtype)
    found = Assignment(*way(z, codes, True, True))
    one_hot = F.one_hot(found.codes, 40).double()
    distance = (z.double() - codes[found.codes].double()).square().sum(dim=1)
    assert found.codes.dtype == torch.int64
    assert torch.equal(found.vectors, codes[found.codes].to(dtype))
    torch.testing.assert_close(found.distance, distance.float())
    torch.testing.assert_close(found.error, distance.sum().float().view(1))
    assert torch.equal(found.counts, one_hot.sum(dim=0).float())
    torch.testing.assert_close(found.sums, (one_hot.T @ z.double()).float())
    assert torch.equal(found.codes, nearest_codes(z, codes))


def test_sums_over_several_chunks() -> None:
    z, codes = cloud(70_000, 5, 32)
    found = assign(z, codes, statistics=True)
    assert found.counts.sum() == len(z)
    expected = torch.zeros(5, 32, dtype=torch.float64).index_add_(0, found.codes, z.double())
    torch.testing.assert_close(found.sums.double(), expected, rtol=1e-5, atol=1e-2)


def test_the_plain_way_is_as_exact() -> None:
    z, codes = cloud(1000, 600, 48, 5.0)
    found = nearest_tiled.assign(z, codes, False, False)[0]
    assert excess(z, codes, found).max() <= tie_margin(48)


def test_nothing_depends_on_the_number_of_threads(threads) -> None:
    z, codes = cloud(5 * ROWS + 77, 700, 48)
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(assign(z, codes, statistics=True))
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.parametrize("k", [37, 900])
def test_a_code_does_not_depend_on_the_other_vectors(k: int) -> None:
    z, codes = cloud(ROWS + 900, k, 40, 2.0)
    codes = torch.cat([codes, codes * (1 + 1e-7)])  # near-ties, which any other rounding would decide otherwise
    found = nearest_codes(z, codes)
    for begin, end in ((0, 1), (5, 70), (100, 1500), (ROWS - 1, ROWS + 1)):
        assert torch.equal(nearest_codes(z[begin:end], codes), found[begin:end])


def test_vectors_with_nan_get_code_0_and_leave_the_others_alone() -> None:
    z, codes = cloud(300, 700, 16)
    spoilt = z.clone()
    spoilt[7, 3] = float("nan")
    rest = torch.arange(300) != 7
    for way in (nearest_cpu.assign, nearest_tiled.assign):
        plain, found = (Assignment(*way(latents, codes, True, False)) for latents in (z, spoilt))
        assert found.codes[7] == 0
        assert found.distance[7].isnan()
        assert found.error.isnan()
        assert torch.equal(found.codes[rest], plain.codes[rest])
        assert torch.equal(found.distance[rest], plain.distance[rest])


def test_infinite_vectors_get_some_code() -> None:
    z, codes = cloud(100, 600, 16)
    z[::3], z[1::3, 2] = 3e38, float("-inf")
    found = nearest_codes(z, codes)
    assert ((found >= 0) & (found < 600)).all()


def test_search_is_fp32_under_autocast_and_for_bf16_latents() -> None:
    z, codes = cloud(500, 64, 16, 5.0)
    plain = nearest_codes(z, codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(z, codes), plain)
        assert torch.equal(nearest_tiled.assign(z, codes, False, False)[0], plain)
    half = z.bfloat16()
    assert torch.equal(nearest_codes(half, codes), nearest_codes(half.float(), codes))


def test_lowered_precision_of_the_process_is_raised_while_searching(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    scores = nearest_cpu._scores

    def look(*arguments: Tensor):
        seen.append(torch.backends.mkldnn.conv.fp32_precision)  # type: ignore[attr-defined]
        return scores(*arguments)

    monkeypatch.setattr(nearest_cpu, "_scores", look)
    setting = torch.backends.mkldnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        with nearest_cpu.full_precision():  # as if another search ran at the same time
            nearest_codes(*cloud(10, 5, 4))
            assert setting.fp32_precision == "ieee"
        assert setting.fp32_precision == "bf16"
        assert set(seen) == {"ieee"}
    finally:
        setting.fp32_precision = before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_and_no_gradient(mode) -> None:
    z, codes = cloud(300, 20, 8)
    plain = assign(z, codes, statistics=True)
    with mode():
        latents = torch.nn.Parameter(z.clone())
        found = assign(latents * 1, codes, statistics=True)
    assert same(found, plain)
    assert not any(getattr(found, part).requires_grad for part in PARTS)


def test_views_are_searched_as_they_are() -> None:
    z, codes = cloud(600, 30, 8)
    wide = torch.cat([z, torch.full_like(z, 9.0)], dim=1)
    assert same(assign(wide[:, :8], codes, statistics=True), assign(z, codes, statistics=True))
    assert torch.equal(nearest_codes(z.T.contiguous().T, codes.T.contiguous().T), nearest_codes(z, codes))


def test_several_threads_may_search_at_once(threads) -> None:
    threads(2)
    problems = [cloud(2 * ROWS + seed, 60, 12) for seed in range(12)]
    alone = [assign(z, codes, statistics=True) for z, codes in problems]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda problem: assign(*problem, statistics=True), problems))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_torchs_own_threads_are_left_as_they_were(threads) -> None:
    threads(3)
    nearest_codes(*cloud(3 * ROWS, 8, 4))
    inherited: list[int] = []
    young = threading.Thread(target=lambda: inherited.append(torch.get_num_threads()))
    young.start()
    young.join()
    assert [torch.get_num_threads(), *inherited] == [3, 3]
    assert single_core_threads(3).submit(torch.get_num_threads).result() == 1


def _search_in_child(problem: tuple[Tensor, Tensor], answer) -> None:
    answer.put(nearest_codes(*problem).tolist())


def test_a_forked_child_can_search(threads) -> None:
    threads(2)
    problem = cloud(100, 8, 4)
    expected = nearest_codes(*problem).tolist()  # the parent's threads run now
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forking with threads
        child = context.Process(target=_search_in_child, args=(problem, answer), daemon=True)
        child.start()
    try:
        child.join(60)
        assert child.exitcode == 0
        assert answer.get() == expected
    finally:
        child.kill()
        child.join()


def test_no_matrix_of_vectors_by_codes_is_ever_made() -> None:
    """Peak memory of a process of its own, which sees every allocation; all scores would be 1 GB."""
    assert quantizer_workspace.measure(500_000, 512, 8, threads=2) < 16e6


def test_dimensions_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(5, 3\) and codes \(4, 2\)"):
        nearest_codes(torch.zeros(5, 3), torch.zeros(4, 2))


def test_compiles_without_looking_inside() -> None:
    z, codes = cloud(100, 20, 8)

    def search(latents: Tensor) -> Tensor:
        found = assign(latents * 2, codes, statistics=True)
        return found.vectors.sum() + found.sums.sum() + found.codes.sum()

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z), search(z))


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
def test_shapes_are_known_without_searching(vectors: bool, statistics: bool) -> None:
    z, codes = cloud(100, 20, 8)
    real = torch.ops.vqscale.assign(z.half(), codes, vectors, statistics)
    fake = torch.ops.vqscale.assign(z.half().to("meta"), codes.to("meta"), vectors, statistics)
    assert [(part.shape, part.dtype) for part in real] == [(part.shape, part.dtype) for part in fake]


def test_the_plain_way_is_never_taken_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "vqscale.models.nearest_triton", raising=False)
    nearest._gpu_way.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without the fused kernel.*triton"):
            assert nearest._gpu_way(64) is nearest_tiled.assign
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert nearest._gpu_way(64) is nearest_tiled.assign  # said once
    finally:
        nearest._gpu_way.cache_clear()
