"""The cross-entropy that copies no logits is torch's, in value and gradient, and needs less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from vqscale.models import cross_entropy as module
from vqscale.models.cross_entropy import cross_entropy


@pytest.fixture(params=[1, 40, 1 << 21])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VALUES", request.param)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_is_torchs_in_fp64(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11, dtype=torch.float64) * 5, torch.randint(11, (7,))
    weights = torch.rand(7, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = cross_entropy(ours, targets, smoothing)
    wanted = F.cross_entropy(theirs, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=0)
    (weights * losses).sum().backward()
    (weights * wanted).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, smoothing), ours)


@pytest.mark.usefixtures("_parts")
def test_bf16_logits_are_summed_in_fp32() -> None:
    """Under autocast too, in which it is called."""
    torch.manual_seed(0)
    logits, targets = torch.randn(300, 16).bfloat16().requires_grad_(), torch.randint(16, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        losses = cross_entropy(logits, targets)
    assert losses.dtype == torch.float32
    exact = F.cross_entropy(logits.detach().double(), targets, reduction="none")
    torch.testing.assert_close(losses.detach().double(), exact, rtol=1e-5, atol=1e-6)
    losses.mean().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    wanted = logits.detach().float().requires_grad_()
    F.cross_entropy(wanted, targets).backward()
    torch.testing.assert_close(logits.grad.float(), wanted.grad, rtol=2**-8, atol=1e-8)


def test_no_copy_of_the_logits_is_kept() -> None:
    kept: list[tuple[torch.Size, torch.dtype]] = []
    logits = torch.randn(64, 32).bfloat16().requires_grad_()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tensor.shape, tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_entropy(logits, torch.randint(32, (64,)))
    assert kept == [(logits.shape, torch.bfloat16), (torch.Size([64]), torch.int64)]


@pytest.mark.parametrize(("device", "parts"), [("cuda", 8), ("cpu", 512)])
def test_a_gpu_is_given_few_large_parts(device: str, parts: int) -> None:
    """32 sequences of 4,096 codes of 8,192: a part costs about ten kernel launches, forward and backward."""
    with FakeTensorMode():
        logits = torch.empty(32 * 4096, 8192, dtype=torch.bfloat16, device=device)
        assert len(module._parts(logits)[0]) == parts
