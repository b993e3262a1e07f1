"""What the transformer computes: the logits of all codes of a sequence, the coarsest level first, in raster order.

The sequence of a sample is [class, c_0, …, c_{T-2}] and position t predicts c_t. What is known about the *target*
of a position is added to its input: the class, where the target lies (learned, by level and cell), the code above it
in its grid, and the code that covers it in the next coarser level (Razavi et al. 2019, section 3.2, condition the
bottom prior on the top in the same way). The blocks are in `transformer_block`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.conditioning import Conditioner
from vqscale.models.convnets import Stack
from vqscale.models.network import CodeNetwork, GridShape
from vqscale.models.transformer_block import Block, Feed, Norm, Positions, Shape, initialise, make_norm, rotations


class TransformerBody(CodeNetwork):
    """One sequence over its levels; levels that are given come in through a `Conditioner`.

    Args:
        grids: one a level, the coarsest first (the order in which codes are predicted).
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        layers, width, ...: size and architecture, explained at `Shape`.
    """

    units = (Block, Stack)

    def __init__(
        self,
        grids: Sequence[GridShape],
        classes: int,
        given: Sequence[GridShape] = (),
        *,
        layers: int,
        width: int,
        heads: int,
        dropout: float = 0.0,
        key_value_heads: int | None = None,
        norm: Norm = "layer",
        feed: Feed = "gelu",
        feed_width: int | None = None,
        positions: Positions = "learned",
    ) -> None:
        super().__init__(grids, classes, given)
        self.shape = Shape(layers, width, heads, dropout, key_value_heads, norm, feed, feed_width, positions)
        self.lengths = [grid.length for grid in grids]
        self.length = sum(self.lengths)
        self.class_token = nn.Embedding(classes + 1, width)  # the last one stands for "no class"
        self.tokens = nn.ModuleList(nn.Embedding(grid.codes, width) for grid in grids)
        counts = self.lengths if positions == "learned" else [1] * len(grids)
        self.positions = nn.ParameterList(nn.Parameter(torch.zeros(count, width)) for count in counts)
        self.class_everywhere = nn.Embedding(classes + 1, width)
        self.above = nn.ModuleList(nn.Embedding(grid.codes, width) for grid in grids)
        self.parents = nn.ModuleList(nn.Embedding(grid.codes, width) for grid in grids[:-1])
        self.condition = Conditioner(given, grids[0].side, width) if given else None
        self.blocks = nn.ModuleList(Block(self.shape) for _ in range(layers))
        self.norm = make_norm(self.shape)
        self.heads = nn.ModuleList(nn.Linear(width, grid.codes, bias=False) for grid in grids)
        for level in range(1, len(grids)):
            cells = _parent_cells(grids[level - 1].side, grids[level].side)
            self.register_buffer(f"parent_{level}", cells, persistent=False)
        turns = turns_of(grids, self.shape.head_width) if positions == "rotary" else None
        self.register_buffer("turns", turns, persistent=False)
        self.turns: Tensor | None
        initialise(self, layers)

    def forward(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """Logits [B, side², K] a level, of every code given those before it."""
        x = self.embed(given, codes, classes)
        for block in self.blocks:
            x = block(x, self.turns)
        parts = self.norm(x).split(self.lengths, dim=1)
        return [head(part) for head, part in zip(self.heads, parts, strict=True)]

    def embed(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> Tensor:
        """What the first block is given: [B, T, width]; the arguments are those of `forward`."""
        flat = [grid.flatten(1).long() for grid in codes]
        embedded = [tokens(grid) for tokens, grid in zip(self.tokens, flat, strict=True)]
        inputs = torch.cat([self.class_token(classes)[:, None], *embedded], dim=1)[:, :-1]
        context = self.context(given)
        targets = torch.cat([self._targets(level, flat, context) for level in range(len(flat))], dim=1)
        return inputs + targets + self.class_everywhere(classes)[:, None]

    def context(self, given: Sequence[Tensor]) -> Tensor | None:
        """What the given levels say of the first level's cells: [B, side², width]; None without any."""
        return self.condition(given).flatten(2).transpose(1, 2) if self.condition is not None else None

    def locate(self, position: int) -> tuple[int, int]:
        """Level and cell of a position of the sequence."""
        for level, length in enumerate(self.lengths):
            if position < length:
                return level, position
            position -= length
        raise IndexError("position behind the end of the sequence")

    def parent_cells(self, level: int) -> Tensor:
        """int64 [side²]: the cell of the next coarser level that covers each cell of a level."""
        return self.get_buffer(f"parent_{level}")

    def _targets(self, level: int, flat: Sequence[Tensor], context: Tensor | None) -> Tensor:
        """What is known of a level's cells before they are predicted: [B, side², width]."""
        side = self.grids[level].side
        above = self.above[level](flat[level][:, :-side])
        known = self.positions[level] + F.pad(above, (0, 0, side, 0))
        if context is not None and level == 0:
            known = known + context
        if level:
            known = known + self.parents[level - 1](flat[level - 1][:, self.parent_cells(level)])
        return known


def _parent_cells(coarse: int, fine: int) -> Tensor:
    """int64 [fine²]: the cell of the coarse grid that covers each cell of the fine one."""
    line = torch.arange(fine) * coarse // fine
    return (line[:, None] * coarse + line[None, :]).flatten()


def turns_of(grids: Sequence[GridShape], dim: int) -> Tensor:
    """Rotations of all positions. A cell lies at its middle, measured in cells of the finest level."""
    finest = max(grid.side for grid in grids)
    places = []
    for grid in grids:
        line = (torch.arange(grid.side) + 0.5) * (finest / grid.side)
        places.append(torch.cartesian_prod(line, line))
    rows, columns = torch.cat(places).unbind(1)
    return rotations(rows, columns, dim)
