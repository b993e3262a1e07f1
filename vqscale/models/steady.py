"""Linear layers whose rows do not depend on how many rows there are, nor on the number of threads.

A sample's codes follow from its logits, so these may not change with the batch that it is drawn in. On a CPU
`F.linear` takes other kernels for one row, few and many, which add up in another order, and splits long sums over
threads. oneDNN's kernels for matrices add up in one order for two rows or more, whatever the threads; with weights in
their layout they are the faster ones too, from about eight rows on (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]
_ROWS = 64
"""Number of rows for which the layout of the weights is chosen; it has to be the same for all batches."""


def steady(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype | None = None) -> Linear:
    """The layer as a function of [..., in], without gradient. On a CPU with fp32 weights it holds a copy of them.

    A convolution becomes a function of windows, flattened as its kernels are: [..., channels · rows · columns].

    Args:
        layer: whose weights are taken.
        dtype: in which is multiplied, as under autocast, but that the weights are cast once; None: that of the weights.
    """
    return steady_matrix(layer.weight.flatten(1), layer.bias, dtype)


def steady_matrix(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Linear:
    """As `steady`, of a matrix [out, in] and what is added, [out]."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if dtype not in (None, weight.dtype):
        narrow, added = weight.to(dtype), None if bias is None else bias.to(dtype)
        return lambda x: F.linear(x.to(dtype), narrow, added)
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)

    def apply(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(_two(rows), packed, bias, "none", [], "")
        return out[: len(rows)].unflatten(0, x.shape[:-1])

    return apply


def steady_convolution(layer: nn.Conv2d) -> Linear:
    """A convolution with stride 1 as a function of [B, in, H, W] whose samples do not depend on the batch."""
    apply, kernel, padding = steady(layer), layer.kernel_size, layer.padding
    assert not isinstance(padding, str)

    def convolve(x: Tensor) -> Tensor:
        windows = F.unfold(x, kernel, padding=padding).transpose(1, 2)
        return apply(windows).transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))

    return convolve


def _two(rows: Tensor) -> Tensor:
    """A single row twice: for one row there are other kernels."""
    return rows.expand(2, -1).contiguous() if len(rows) == 1 else rows
