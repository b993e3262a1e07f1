"""Decoder-only transformer over code grids: what it computes (`transformer_body`), and how codes are drawn from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.models.generate import LOGIT_BYTES, Draws
from vqscale.models.transformer_body import TransformerBody
from vqscale.models.transformer_steps import Decoder, Walk


class Transformer(TransformerBody):
    """A network of a prior; its arguments are those of `TransformerBody`."""

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw code by code."""
        rows = draws.rows(classes, self.no_class)
        condition = None if self.condition is None else draws.spread(self.condition.apart(given))
        context = None if condition is None else condition.flatten(2).transpose(1, 2)
        decoder = Decoder(self, rows, context, draws.dtype)
        walk = Walk(decoder, draws, torch.cat([grid.flatten(1) for grid in known], dim=1))
        start = 0
        for level, length in enumerate(self.lengths):
            walk.level(level, start, start + length)
            start += length
        return [grid[: len(classes)] for grid in decoder.codes()]

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of all positions, and the logits of one."""
        return self.shape.cache_bytes(self.length, dtype) + LOGIT_BYTES * max(grid.codes for grid in self.grids)
