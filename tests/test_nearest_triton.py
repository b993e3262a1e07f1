"""The GPU's kernels: with a GPU compiled, without one in Triton's interpreter, in a process of its own.

The interpreter has to be asked for before Triton is imported, and then stays for the life of the process.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_nearest import PARTS, cloud, excess
from vqscale.models import nearest_cpu
from vqscale.models.nearest import Assignment, assign, tie_margin

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton", allow_module_level=True)

kernel_test = pytest.mark.skipif(not (INTERPRETED or GPU), reason="no GPU; test_in_the_interpreter runs it there")


@pytest.fixture
def kernels() -> ModuleType:
    return importlib.import_module("vqscale.models.nearest_triton")


def run(kernels: ModuleType, z: Tensor, codes: Tensor, statistics: bool = True) -> Assignment:
    """Compiled kernels by the way that the codebook calls them; interpreted ones directly."""
    if not INTERPRETED:
        found = assign(z.to(DEVICE), codes.to(DEVICE), statistics=statistics)
        return Assignment(**{part: getattr(found, part).cpu() for part in PARTS})
    return Assignment(*kernels.assign(z, codes, True, statistics))


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    # One thread: Triton's interpreter works on small arrays.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "runs it there" not in done.stdout


@kernel_test
@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("d", [1, 3, 16, 33, 64, 128, 256])
@pytest.mark.parametrize(("n", "k"), [(70, 2), (129, 37), (40, 300)])
def test_no_code_is_nearer_beyond_the_stated_margin(kernels: ModuleType, n: int, k: int, d: int, offset: float) -> None:
    z, codes = cloud(n, k, d, offset)
    found = run(kernels, z, codes, statistics=False)
    assert excess(z, codes, found.codes).max() <= tie_margin(d, tensor_cores=True)


@kernel_test
def test_many_codes(kernels: ModuleType) -> None:
    z, codes = cloud(50, 16_384, 8, 1.0)
    assert excess(z, codes, run(kernels, z, codes, statistics=False).codes).max() <= tie_margin(8, tensor_cores=True)


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize(("k", "d"), [(512, 64), (8192, 64), (1024, 256), (512, 100), (16, 8)])
def test_compiled_kernels_on_many_vectors(kernels: ModuleType, k: int, d: int) -> None:
    z, codes = cloud(100_001, k, d, 1.0)
    found, again = (run(kernels, z, codes) for _ in range(2))
    for part in PARTS:
        assert torch.equal(getattr(found, part), getattr(again, part))
    sample = torch.arange(0, len(z), 13)
    assert excess(z[sample], codes, found.codes[sample]).max() <= tie_margin(d, tensor_cores=True)
    expected = nearest_cpu.assign(z, codes, True, True)
    assert (found.codes == expected[0]).float().mean() > 0.9999
    sums = torch.zeros(k, d, dtype=torch.float64).index_add_(0, found.codes, z.double())
    torch.testing.assert_close(found.sums.double(), sums, rtol=1e-4, atol=1e-2)


@kernel_test
@pytest.mark.parametrize("n", [0, 1, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_equals_the_way_of_the_cpu(kernels: ModuleType, n: int, dtype: torch.dtype) -> None:
    z, codes = cloud(n, 40, 20, 0.5)
    z = z.to(dtype)
    found, expected = run(kernels, z, codes), Assignment(*nearest_cpu.assign(z, codes, True, True))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.counts, expected.counts)
    # Triton's interpreter cuts off where a GPU rounds to bf16.
    rounding = 2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=rounding, atol=0)
    for part in ("distance", "error", "sums"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part))


@kernel_test
@pytest.mark.parametrize("facts", [(100 * 1024, True), (48 * 1024, True), (48 * 1024, False)])
def test_the_launches_of_other_gpus(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, facts: tuple[int, bool]
) -> None:
    """Less shared memory fetches parts of the vectors again; without TF32 one plain product is made."""
    monkeypatch.setattr(kernels, "_facts", lambda device: facts)
    for k, d in ((70, 100), (5, 3)):
        z, codes = cloud(150, k, d, 2.0)
        found, expected = run(kernels, z, codes), Assignment(*nearest_cpu.assign(z, codes, True, True))
        assert torch.equal(found.codes, expected.codes)
        torch.testing.assert_close(found.distance, expected.distance)
        assert torch.equal(found.vectors, expected.vectors)


@kernel_test
def test_of_equal_codes_the_lowest_is_taken(kernels: ModuleType) -> None:
    # Quarters around zero: centring leaves them, and their products are exact, in whatever order they are added up.
    z, half = ((4 * part).round() / 4 for part in cloud(140, 25, 24))
    codes = torch.cat([half, -half])
    plain = run(kernels, z, codes, statistics=False).codes
    assert torch.equal(run(kernels, z, torch.cat([codes, codes, codes]), statistics=False).codes, plain)


@kernel_test
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF])
def test_vectors_with_nan_get_code_0_and_leave_the_others_alone(kernels: ModuleType, bits: int) -> None:
    """NaN as a CPU writes it, and as a GPU's arithmetic does."""
    z, codes = cloud(140, 50, 24)
    spoilt = z.clone()
    spoilt[7, 3], spoilt[8, 2] = torch.tensor(bits, dtype=torch.int32).view(torch.float32), float("inf")
    rest = (torch.arange(140) != 7) & (torch.arange(140) != 8)
    plain, found = run(kernels, z, codes), run(kernels, spoilt, codes)
    assert found.codes[7] == 0
    assert found.distance[7].isnan()
    assert ((found.codes >= 0) & (found.codes < 50)).all()
    assert torch.equal(found.codes[rest], plain.codes[rest])
    assert found.sums[1:].isfinite().all(dim=1).sum() >= 48  # all but those of the two spoilt vectors' codes


@kernel_test
@pytest.mark.parametrize("short_keys", [2**15, 8])
@pytest.mark.parametrize("kind", ["collapsed", "spread", "scattered", "last"])
def test_sums_of_any_assignment(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, short_keys: int
) -> None:
    """All vectors in one code, one in each, at random with most codes unused, or all in the last code."""
    monkeypatch.setattr(kernels, "SHORT_KEYS", short_keys)
    n, size = 300, 40 if kind != "spread" else 300
    generator = torch.Generator().manual_seed(1)
    nearest = {
        "collapsed": torch.full((n,), 3),
        "spread": torch.randperm(n, generator=generator),
        "scattered": torch.randint(0, 6, (n,), generator=generator) * 7,
        "last": torch.full((n,), size - 1),
    }[kind]
    z = torch.randn(n, 20, generator=generator)
    counts, sums = (part.cpu() for part in kernels.sum_by_code(z.to(DEVICE), nearest.to(DEVICE), size))
    one_hot = F.one_hot(nearest, size).double()
    assert torch.equal(counts, one_hot.sum(dim=0).float())
    torch.testing.assert_close(sums, (one_hot.T @ z.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled in the interpreter")
@pytest.mark.parametrize(
    ("capability", "dim", "split"),
    [
        (90, 16, True),
        pytest.param(90, 64, True, marks=pytest.mark.slow),
        pytest.param(90, 128, True, marks=pytest.mark.slow),
        (90, 256, True),
        (80, 64, True),
        pytest.param(80, 256, True, marks=pytest.mark.slow),
        (75, 64, False),
    ],
)
def test_launches_compile_within_the_shared_memory(
    kernels: ModuleType, capability: int, dim: int, split: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Down to machine code, which needs no GPU; the interpreter accepts what the compiler does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    available = {90: 227, 80: 163, 75: 64}[capability] * 1024
    compiled = partial(_compile, capability=capability)
    launch = kernels.choose(dim, 512, available)
    blocks = {"dim": dim, "block_dim": dim}
    found = compiled(
        kernels._search,
        {**blocks, "chunk": launch.chunk, "block_rows": launch.rows, "block_codes": launch.codes}
        | {"stages": launch.stages, "split": split, "wanted": True},
        warps=launch.warps,
    )
    assert found.metadata.shared <= available
    compiled(kernels._prepare, {**blocks, "block_codes": launch.codes, "split": split})
    compiled(kernels._partial_sums, {**blocks, "block_rows": 32})
    compiled(kernels._total_sums, {**blocks, "block_rows": 32, "block_parts": 32})


def _compile(kernel, constants, capability: int, warps: int = 4):
    import triton
    from triton.backends.compiler import GPUTarget

    plain = {"n": "i32", "size": "i32", "padded": "i32", "nearest": "*i64", "order": "*i64", "bags": "*i64"}
    others = {"ordered": "*i16", "z": "*bf16", "vectors": "*bf16"}
    types = {name: (plain | others).get(name, "*fp32") for name in kernel.arg_names} | dict.fromkeys(
        constants, "constexpr"
    )
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
