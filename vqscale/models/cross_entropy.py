"""Cross-entropy that copies no logits: they stay in their dtype, and only a few rows at a time become fp32.

`F.cross_entropy` on bf16 logits [N, K] needs them in fp32, their log-softmax, and both gradients: 16 bytes a value
beside the 2 of the logits. Here it is the gradient alone, 2 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_VALUES = 1 << 21
"""Logits that are fp32 at a time."""
_VALUES_ON_GPU = 1 << 27
"""The same where launching kernels for so few would take longer than computing them; 512 MiB a copy."""


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of each row, in nats: -Σ q log softmax(logits).

    Args:
        logits: [N, K], any floating dtype; nobody may change them before the backward.
        targets: int64 [N].
        smoothing: share of the target q that is spread over all K (Szegedy et al. 2016, section 7).

    Returns:
        fp32 [N] (fp64 for fp64 logits).
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets, smoothing)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        losses = []
        for part, chosen in zip(*_parts(logits, targets), strict=True):
            scores = part.to(_wide(logits))
            wanted = (1 - smoothing) * scores.gather(1, chosen[:, None])[:, 0]
            if smoothing:
                wanted = wanted + smoothing * scores.mean(1)
            losses.append(scores.logsumexp(1) - wanted)
        ctx.save_for_backward(logits, targets)
        ctx.smoothing = smoothing
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        out, count = torch.empty_like(logits), logits.shape[1]
        for part, chosen, share, place in zip(*_parts(logits, targets, gradient, out), strict=True):
            slope = part.to(_wide(logits)).softmax(1)
            if ctx.smoothing:
                slope -= ctx.smoothing / count
            slope.scatter_add_(1, chosen[:, None], slope.new_full((len(chosen), 1), ctx.smoothing - 1))
            place.copy_(slope.mul_(share[:, None]))
        return out, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _parts(logits: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    values = _VALUES_ON_GPU if logits.is_cuda else _VALUES
    rows = max(1, values // logits.shape[1])
    return [tensor.split(rows) for tensor in (logits, *others)]
