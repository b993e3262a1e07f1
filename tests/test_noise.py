"""Random numbers of a step's samples, and how they come to the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vqscale.models.noise import normals_at, uniforms_at
from vqscale.models.upload import upload

Drawn = Callable[[int, Tensor, int], Tensor]
UNIFORMS = [0.020579338, 0.26997453, 0.34670496]
NORMALS = [0.019624507, -0.60347754, 0.35885367]
BOTH = pytest.mark.parametrize("drawn", [uniforms_at, normals_at])


@BOTH
def test_a_row_follows_from_seed_and_place_alone(drawn: Drawn) -> None:
    """Whatever else is drawn with it; an odd count leaves half of one of the generator's words."""
    whole = drawn(3, torch.arange(40), 5)
    assert whole.dtype == torch.float32
    assert whole.shape == (40, 5)
    some = torch.tensor([39, 0, 7, 8])
    assert torch.equal(drawn(3, some, 5), whole[some])
    assert torch.equal(drawn(3, some, 2), whole[some, :2])
    assert len(whole.unique()) == whole.numel()
    assert not (drawn(4, torch.arange(40), 5) == whole).any()
    assert drawn(3, torch.arange(0), 5).shape == (0, 5)
    assert drawn(3, some, 0).shape == (4, 0)


def test_their_distributions() -> None:
    uniforms, normals = (drawn(0, torch.arange(2000), 50) for drawn in (uniforms_at, normals_at))
    assert 0 <= uniforms.min() <= uniforms.max() < 1
    assert uniforms.mean().item() == pytest.approx(0.5, abs=0.004)
    assert uniforms.std().item() == pytest.approx(12**-0.5, abs=0.004)
    assert normals.mean().item() == pytest.approx(0, abs=0.013)
    assert normals.std().item() == pytest.approx(1, abs=0.01)
    for numbers in (uniforms, normals):
        neighbours = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
        assert abs(neighbours.item()) < 0.013


def test_the_numbers_are_those_of_every_version() -> None:
    """A run that goes on with another NumPy sees the noise that it would have seen."""
    place = torch.tensor([2])
    assert uniforms_at(1, place, 3)[0].tolist() == pytest.approx(UNIFORMS, abs=1e-7)
    assert normals_at(1, place, 3)[0].tolist() == pytest.approx(NORMALS, abs=1e-6)


class _OnGpu(Tensor):
    """Of a machine with a GPU, what `upload` asks of a tensor."""

    done: list[object]

    def pin_memory(self) -> Tensor:  # type: ignore[override]
        self.done.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Tensor:  # type: ignore[override]
        self.done.append((device.type, non_blocking))
        return self


def test_an_upload_does_not_wait_for_the_gpu() -> None:
    numbers = torch.arange(3)
    assert upload(numbers, torch.device("cpu")) is numbers
    watched = numbers.as_subclass(_OnGpu)
    watched.done = []
    upload(watched, torch.device("cuda"))
    assert watched.done == ["pinned", ("cuda", True)]
