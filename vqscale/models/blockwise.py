"""One code grid in a few passes, with an exact likelihood: a block-autoregressive transformer.

The cells are cut into a fixed sequence of sets (`pass_order`). Those of a set are drawn at once, each given all sets
before: p(z) = Π_p Π_{i in p} p(z_i | z_<p). It is what masked prediction meets when it draws a grid, but always in the
same order: so the network learns a few states instead of 2^T, and all of them from every grid. Such models are
Parallel Multiscale PixelCNN (Reed et al. 2017) and Set Autoregressive Modeling (Liu et al. 2024).

One forward trains all passes. As in a transformer that goes code by code, a position is about the cell that it
predicts and carries a code that was drawn just before: one of the set before, a near one. With as many passes as cells
it is that transformer, in another order. Attention is by blocks: a position sees those of its own set and of the sets
before, none of which holds a code of its own set. So keys and values of what is drawn can be kept, and a grid costs
T positions whatever the number of passes, where masked prediction computes T in every pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.conditioning import Conditioner
from vqscale.models.convnets import Stack
from vqscale.models.generate import LOGIT_BYTES, Draws
from vqscale.models.network import CodeNetwork, GridShape
from vqscale.models.pass_order import Order, Passes, make_passes, spread_parts, wave_parts
from vqscale.models.steady import steady
from vqscale.models.steady_block import SteadyBlock
from vqscale.models.transformer_block import (
    Block,
    Feed,
    Norm,
    Positions,
    Shape,
    attend,
    initialise,
    make_norm,
)
from vqscale.models.transformer_body import turns_of

_LARGE = 32
"""Cells a pass from which on passes attend one after the other."""


class PassBlock(Block):
    """A block in which a position sees those of its own pass and of the passes before.

    Args:
        shape: size and architecture.
        sizes: positions of each pass, one after the other.
    """

    def __init__(self, shape: Shape, sizes: Sequence[int]) -> None:
        super().__init__(shape)
        self.sizes = list(sizes)
        number = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        self.register_buffer("number", number, persistent=False)
        self.number: Tensor

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Large passes one after the other, so that nothing is computed that is not seen; small ones under a mask.

        At fewer than about 32 cells a pass so many small products take longer than what they leave out.
        """
        if len(self.number) < _LARGE * len(self.sizes):
            return attend(query, key, value, self.number[:, None] >= self.number, causal=False)
        parts = zip(query.split(self.sizes, dim=2), accumulate(self.sizes), strict=True)
        mixed = [attend(part, key[:, :, :stop], value[:, :, :stop], causal=False) for part, stop in parts]
        return torch.cat(mixed, dim=2)


class Blockwise(CodeNetwork):
    """One level.

    Args:
        grids: the one level that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        layers, width, ...: size and architecture, explained at `Shape`.
        order: `spread` or `wave`, explained at `pass_order`.
        passes: of `spread`: forward passes that a grid is drawn in; no more than it has cells are made.
        schedule: of `spread`: key of `pass_order.SCHEDULES`: how many cells the passes have.
        window: odd side of the square of cells around it that each cell is told directly, as far as they are drawn.
    """

    units = (PassBlock, Stack)

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
        order: Order,
        passes: int,
        schedule: str,
        window: int,
    ) -> None:
        super().__init__(grids, classes, given)
        shape = self.shape = Shape(layers, width, heads, dropout, key_value_heads, norm, feed, feed_width, positions)
        (self.grid,) = grids
        side = self.grid.side
        parts = wave_parts(side) if order == "wave" else spread_parts(side, passes, schedule)
        passed = make_passes(side, parts, window)
        self.starts, self.sizes = passed.starts, passed.sizes
        self._keep_places(passed)
        self.tokens = nn.Embedding(self.grid.codes + 1, width)  # the last one stands for "none before"
        self.neighbours = nn.Embedding(self.grid.codes + 2, width)  # then "not drawn yet" and "outside of the grid"
        self.around = nn.Linear(width, (window**2 - 1) * width, bias=False)
        self.class_everywhere = nn.Embedding(classes + 1, width)  # the last one stands for "no class"
        self.positions = nn.ParameterList([nn.Parameter(torch.zeros(self.grid.length, width))])
        turns = turns_of(grids, shape.head_width)[:, passed.order] if positions == "rotary" else None
        self.register_buffer("turns", turns, persistent=False)
        self.turns: Tensor | None
        self.condition = Conditioner(given, self.grid.side, width) if given else None
        self.blocks = nn.ModuleList(PassBlock(shape, self.sizes) for _ in range(layers))
        self.norm = make_norm(shape)
        self.head = nn.Linear(width, self.grid.codes, bias=False)
        initialise(self, layers)

    def _keep_places(self, passed: Passes) -> None:
        """Which cell each place is about and what it is told, as buffers that no checkpoint holds."""
        tables = {"order": passed.order, "place": passed.order.argsort(), "carried": passed.carried}
        for name, table in {**tables, "near": passed.near, "seen": passed.seen}.items():
            self.register_buffer(name, table, persistent=False)
        self.order: Tensor
        self.place: Tensor
        self.carried: Tensor
        self.near: Tensor
        self.seen: Tensor

    def forward(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """Logits [[B, side², K]] of every code given those of the passes before."""
        condition = None if self.condition is None else self.condition(given)
        x = self.told(codes[0].flatten(1), self.table(), 0, self.grid.length) + self.context(classes, condition)
        for block in self.blocks:
            x = block(x, self.turns)
        return [self.head(self.norm(x))[:, self.place]]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw pass after pass."""
        condition = None if self.condition is None else draws.spread(self.condition.apart(given))
        steps = BlockwiseSteps(self, self.context(draws.rows(classes, self.no_class), condition), draws.dtype)
        scales = draws.sampling.scales(len(self.sizes)).to(classes.device)
        uniforms = draws.uniforms(self.grid.length)
        codes = known[0].flatten(1).clone()
        for number, cells in enumerate(self.order.split(self.sizes)):
            logits = draws.guide(steps.logits(number, draws.spread(codes)), scales[number])
            drawn = draws.codes(logits.flatten(0, 1), uniforms[:, cells].flatten()).view(-1, len(cells))
            codes[:, cells] = torch.where(codes[:, cells] < 0, drawn, codes[:, cells])
        return [codes.view_as(known[0])]

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of all positions, and the logits of the largest pass."""
        return self.shape.cache_bytes(self.grid.length, dtype) + LOGIT_BYTES * max(self.sizes) * self.grid.codes

    def context(self, classes: Tensor, condition: Tensor | None) -> Tensor:
        """What is known of each place's cell beforehand: [B, side², width]."""
        known = self.class_everywhere(classes)[:, None] + self.positions[0]
        if condition is not None:
            known = known + condition.flatten(2).transpose(1, 2)
        return known[:, self.order]

    def table(self) -> Tensor:
        """What each code says as each of the neighbours: fp32 [(window² - 1) · (K + 2), width].

        Codes are few and cells are many: so the matrices are applied to the codes, and cells add up rows.
        """
        said = self.around(self.neighbours.weight).unflatten(1, (self.near.shape[1], -1))
        return said.transpose(0, 1).flatten(0, 1).float()

    def told(self, flat: Tensor, table: Tensor, start: int, stop: int) -> Tensor:
        """What the codes drawn before say to the places from `start` to `stop`: [B, n, width].

        Args:
            flat: codes int64 [B, side²]; those of the places' own and later passes may be anything.
            table: of `table`.
            start: first place.
            stop: last place and one.
        """
        none, seen, slots = self.grid.codes, self.seen[start:stop], torch.arange(self.near.shape[1], device=flat.device)
        padded = F.pad(flat, (0, 1), value=none + 1)
        rows = torch.where(seen, padded[:, self.near[start:stop]], none) + slots * (none + 2)
        around = F.embedding_bag(rows.flatten(0, 1), table, mode="sum").unflatten(0, rows.shape[:2])
        return around + self.tokens(padded[:, self.carried[start:stop]].clamp(max=none))


class BlockwiseSteps:
    """The network while codes are drawn; each pass is computed once. What it gives a row does not depend on others.

    Args:
        network: in evaluation mode; its weights are those of the moment.
        context: what is known of each place's cell beforehand, [B, side², width].
        dtype: of the blocks' matrices, keys and values; None: that of the weights.
    """

    def __init__(self, network: Blockwise, context: Tensor, dtype: torch.dtype | None = None) -> None:
        self._network, self._context, self._table = network, context, network.table()
        self._head = steady(network.head, dtype)
        self._blocks = [
            PassSteps(block, len(context), network.grid.length, dtype)
            for block in network.blocks
            if isinstance(block, PassBlock)
        ]

    def logits(self, number: int, flat: Tensor) -> Tensor:
        """Logits [B, n, K] of the cells of one pass; the passes before have to have been asked for, in their order.

        Args:
            number: of the pass.
            flat: codes int64 [B, side²], of which those of the passes before are looked at.
        """
        network = self._network
        start, stop = network.starts[number : number + 2]
        x = network.told(flat, self._table, start, stop) + self._context[:, start:stop]
        turns = None if network.turns is None else network.turns[:, start:stop]
        for block in self._blocks:
            x = block.run(x, start, turns)
        return self._head(network.norm(x))


class PassSteps:
    """A block with the keys and values [B, groups, T, d] of the passes so far.

    Args:
        block: whose weights are taken.
        rows: B.
        length: T.
        dtype: as for `BlockwiseSteps`.
    """

    def __init__(self, block: PassBlock, rows: int, length: int, dtype: torch.dtype | None = None) -> None:
        shape, weight = block.shape, block.project.weight
        self._block = SteadyBlock(block, dtype)
        self._keys = weight.new_empty(rows, shape.groups, length, shape.head_width, dtype=dtype)
        self._values = torch.empty_like(self._keys)

    def run(self, x: Tensor, start: int, turns: Tensor | None) -> Tensor:
        """The positions [B, n, width] of one pass through the block.

        Args:
            x: the residual stream.
            start: place of the first.
            turns: rotations [2, n, d / 2] of the positions.
        """
        stop = start + x.shape[1]

        def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self._keys[:, :, start:stop], self._values[:, :, start:stop] = key, value
            return attend(query, self._keys[:, :, :stop], self._values[:, :, :stop], causal=False)

        return self._block(x, turns, mix)
