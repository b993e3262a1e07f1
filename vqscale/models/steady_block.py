"""A transformer's block while codes are drawn: no gradient, no dropout, and rows that do not depend on each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vqscale.models.steady import steady
from vqscale.models.transformer_block import Block, merge_heads, rotate, split_heads

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries [B, heads, n, d], keys and values [B, groups, n, d] of the new positions to [B, heads, n, d]."""


class SteadyBlock:
    """A block whose linear layers are `steady`; how its positions see each other is told with every call.

    Args:
        block: whose weights are taken.
        dtype: of the matrices; None: that of the weights. The residual stream and norms keep that.
    """

    def __init__(self, block: Block, dtype: torch.dtype | None = None) -> None:
        first, self._bend, last = block.feed
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        self._block = block
        self._query_key_value, self._project = steady(block.query_key_value, dtype), steady(block.project, dtype)
        self._into, self._out = steady(first, dtype), steady(last, dtype)

    def __call__(self, x: Tensor, turns: Tensor | None, mix: Mix) -> Tensor:
        """Positions [B, n, width] of the residual stream through the block.

        Args:
            x: the stream.
            turns: rotations [2, n, d / 2] of the positions; None without rotary positions.
            mix: what each position takes from those that it sees.
        """
        query, key, value = split_heads(self._query_key_value(self._block.norm_attention(x)), self._block.shape)
        if turns is not None:
            query, key = rotate(query, turns), rotate(key, turns)
        x = x + self._project(merge_heads(mix(query, key, value)))
        return x + self._out(self._bend(self._into(self._block.norm_feed(x))))
