import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqscale.models.nearest import TILE, nearest_codes


def exact(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest code in fp64 and the gap to the second nearest, relative to the distances' size."""
    distance = torch.cdist(z.double(), codes.double()).square()
    two = distance.topk(2, largest=False)
    return two.indices[:, 0], (two.values[:, 1] - two.values[:, 0]) / two.values[:, 1]


@pytest.mark.parametrize("offset", [0.0, 1.0, 50.0])
@pytest.mark.parametrize(("n", "k", "d"), [(5, 2, 1), (TILE + 3, 512, 64), (3 * TILE, 100, 8)])
def test_equals_fp64_outside_ties(n: int, k: int, d: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(n + k)
    z = torch.randn(n, d, generator=generator) * 0.3 + offset
    codes = torch.randn(k, d, generator=generator) * 0.3 + offset
    nearest, gap = exact(z, codes)
    clear = gap > 1e-4
    assert clear.float().mean() > 0.95
    assert torch.equal(nearest_codes(z, codes)[clear], nearest[clear])


def test_search_is_fp32_under_autocast_and_for_bf16_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    z, codes = torch.randn(500, 16, generator=generator) + 5, torch.randn(64, 16, generator=generator) + 5
    plain = nearest_codes(z, codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(z, codes), plain)
    half = z.bfloat16()
    assert torch.equal(nearest_codes(half, codes), nearest_codes(half.float(), codes))


def test_ties_go_to_the_lowest_index() -> None:
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert nearest_codes(torch.tensor([[0.0, 3.0], [2.0, 0.0]]), codes).tolist() == [0, 0]


def test_no_matrix_of_vectors_by_codes_is_ever_made() -> None:
    n, k, d = 16 * TILE, 512, 4
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        nearest_codes(torch.randn(n, d), torch.randn(k, d))
    assert largest == TILE * k  # one tile, whatever n
