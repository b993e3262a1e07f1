"""Decoder-only transformer over code grids: the coarsest level first, each level in raster order.

The sequence of a sample is [class, c_0, …, c_{T-2}] and position t predicts c_t. What is known about the *target*
of a position is added to its input: the class, where the target lies (learned, by level and cell), the code above it
in its grid, and the code that covers it in the next coarser level (Razavi et al. 2019, section 3.2, condition the
bottom prior on the top in the same way). Layer norm before each branch and a GELU feed-forward, as in GPT-2
(Radford et al. 2019), without biases in norms and attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.conditioning import Conditioner
from vqscale.models.convnets import Stack
from vqscale.models.generate import Draws
from vqscale.models.network import GridShape, Network


class KeyValueCache:
    """Keys and values of one layer for all positions, allocated once: [B, heads, T, width of a head]."""

    def __init__(self, batch: int, heads: int, length: int, dim: int, like: Tensor) -> None:
        self.keys = like.new_zeros(batch, heads, length, dim)
        self.values = torch.zeros_like(self.keys)

    def extend(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions from `start` on; returns all positions up to them."""
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    Args:
        width: of the stream.
        heads: of the attention.
        dropout: on both branches.
        causal: whether a position sees none behind it.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_feed = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None, start: int = 0) -> Tensor:
        """[B, n, width] to the same; with a cache, x holds positions `start` to `start + n - 1`."""
        x = x + self.dropout(self.project(self._attend(self.norm_attention(x), cache, start)))
        return x + self.dropout(self.feed(self.norm_feed(x)))

    def _attend(self, x: Tensor, cache: KeyValueCache | None, start: int) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.query_key_value(x).view(shape).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu":  # torch's bf16 attention on the CPU is several times slower than fp32
            query, key, value = query.float(), key.float(), value.float()
        if cache is not None:
            key, value = cache.extend(start, key, value)
        with torch.autocast(x.device.type, enabled=False):  # which would cast back to bf16
            # Several new positions behind cached ones would need a mask; sampling adds them one by one.
            out = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal and length > 1)
        return out.transpose(1, 2).reshape(batch, length, width)


class Transformer(Network):
    """One sequence over its levels; levels that are given come in through a `Conditioner`.

    Args:
        grids: one a level, the coarsest first (the order in which codes are predicted).
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        layers, width, heads, dropout: size of the network.
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
    ) -> None:
        super().__init__(grids, classes, given)
        self.lengths = [grid.length for grid in grids]
        self.length = sum(self.lengths)
        self.class_token = nn.Embedding(classes + 1, width)  # the last one stands for "no class"
        self.tokens = nn.ModuleList(nn.Embedding(grid.codes, width) for grid in grids)
        self.positions = nn.ParameterList(nn.Parameter(torch.zeros(length, width)) for length in self.lengths)
        self.class_everywhere = nn.Embedding(classes + 1, width)
        self.above = nn.ModuleList(nn.Embedding(grid.codes, width) for grid in grids)
        self.parents = nn.ModuleList(nn.Embedding(grid.codes, width) for grid in grids[:-1])
        self.condition = Conditioner(given, grids[0].side, width) if given else None
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.heads = nn.ModuleList(nn.Linear(width, grid.codes, bias=False) for grid in grids)
        for level in range(1, len(grids)):
            self.register_buffer(
                f"parent_{level}", _parent_cells(grids[level - 1].side, grids[level].side), persistent=False
            )
        self._initialise(layers)

    def forward(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """Logits [B, side², K] a level, of every code given those before it."""
        flat = [grid.flatten(1).long() for grid in codes]
        embedded = [tokens(grid) for tokens, grid in zip(self.tokens, flat, strict=True)]
        inputs = torch.cat([self.class_token(classes)[:, None], *embedded], dim=1)[:, :-1]
        context = self._context(given)
        targets = torch.cat([self._targets(level, flat, context) for level in range(len(flat))], dim=1)
        x = inputs + targets + self.class_everywhere(classes)[:, None]
        for block in self.blocks:
            x = block(x)
        parts = self.norm(x).split(self.lengths, dim=1)
        return [head(part) for head, part in zip(self.heads, parts, strict=True)]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw code by code."""
        rows, uniforms = draws.rows(classes, self.no_class), draws.uniforms(self.length)
        context = self._context([draws.spread(grid) for grid in given])
        kept = [grid.flatten(1) for grid in known]
        flat = [torch.zeros(len(rows), length, dtype=torch.int64, device=classes.device) for length in self.lengths]
        caches = self.caches(len(rows), self.class_token.weight)
        for position in range(self.length):
            level, cell = self.locate(position)
            logits = draws.guide(self.step(position, rows, flat, caches, context))
            drawn, stays = draws.codes(logits, uniforms[:, position]), kept[level][:, cell]
            flat[level][:, cell] = draws.spread(torch.where(stays < 0, drawn, stays))
        return [codes[: len(classes)].view_as(grid) for codes, grid in zip(flat, known, strict=True)]

    def step(
        self,
        position: int,
        classes: Tensor,
        flat: Sequence[Tensor],
        caches: Sequence[KeyValueCache],
        context: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, K] of the code at `position`, from the codes before it and the cache.

        Args:
            position: number of the code in the sequence.
            classes: int [B].
            flat: int64 [B, side²] a level; filled up to `position`.
            caches: one a layer, holding the positions before.
            context: what the given levels say of the first level, [B, side², width].
        """
        level, cell = self.locate(position)
        if position:
            before, at = self.locate(position - 1)
            x = self.tokens[before](flat[before][:, at])
        else:
            x = self.class_token(classes)
        x = x + self.class_everywhere(classes) + self.positions[level][cell]
        if context is not None and level == 0:
            x = x + context[:, cell]
        if level:
            parent = self._parent_cell(level)[cell]
            x = x + self.parents[level - 1](flat[level - 1][:, parent])
        side = self.grids[level].side
        if cell >= side:
            x = x + self.above[level](flat[level][:, cell - side])
        x = x[:, None]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache, position)
        return self.heads[level](self.norm(x[:, 0]))

    def caches(self, batch: int, like: Tensor) -> list[KeyValueCache]:
        """Empty caches for `batch` sequences, in the dtype and on the device of `like`."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        width = self.class_token.embedding_dim
        return [KeyValueCache(batch, block.heads, self.length, width // block.heads, like) for block in blocks]

    def locate(self, position: int) -> tuple[int, int]:
        """Level and cell of a position of the sequence."""
        for level, length in enumerate(self.lengths):
            if position < length:
                return level, position
            position -= length
        raise IndexError("position behind the end of the sequence")

    def _context(self, given: Sequence[Tensor]) -> Tensor | None:
        """What the given levels say of the first level's cells: [B, side², width]."""
        return self.condition(given).flatten(2).transpose(1, 2) if self.condition is not None else None

    def _targets(self, level: int, flat: Sequence[Tensor], context: Tensor | None) -> Tensor:
        """What is known of a level's cells before they are predicted: [B, side², width]."""
        side = self.grids[level].side
        above = self.above[level](flat[level][:, :-side])
        known = self.positions[level] + F.pad(above, (0, 0, side, 0))
        if context is not None and level == 0:
            known = known + context
        if level:
            known = known + self.parents[level - 1](flat[level - 1][:, self._parent_cell(level)])
        return known

    def _parent_cell(self, level: int) -> Tensor:
        return getattr(self, f"parent_{level}")

    def _initialise(self, layers: int) -> None:
        """Normal 0.02; the projections into the residual stream are scaled down by depth (Radford et al. 2019)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.endswith(("project.weight", "feed.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if into_stream else 0.02)


def _parent_cells(coarse: int, fine: int) -> Tensor:
    """int64 [fine²]: the cell of the coarse grid that covers each cell of the fine one."""
    line = torch.arange(fine) * coarse // fine
    return (line[:, None] * coarse + line[None, :]).flatten()
