"""Gated PixelCNN (van den Oord et al. 2016b, Conditional Image Generation with PixelCNN Decoders) over one code grid.

Two stacks of convolutions: the vertical one sees all rows above a cell, the horizontal one the cells to the left in its
row and, through a link, the vertical one; together they have no blind spot (section 2.2, figure 2). A gate
tanh(a) · sigmoid(b) stands where a ReLU would (equation 2). It is told the class, the place in the grid and the coarser
levels (section 2.3). Residuals on the horizontal stack only.

Instead of masking kernels, what goes in is shifted: the horizontal stack by one cell to the right, what the vertical
stack tells it by one row down. Then all layers are alike.
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


class GatedLayer(nn.Module):
    """One layer of both stacks (figure 2 of the paper).

    Args:
        width: channels of each stack, and of what is told.
        kernel: odd side of the kernel that is cut in half.
        dropout: on the horizontal branch.
    """

    def __init__(self, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.down = nn.Conv2d(width, 2 * width, (self.reach + 1, kernel))
        self.along = nn.Conv2d(width, 2 * width, (1, self.reach + 1))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.told = nn.Conv2d(width, 4 * width, 1)
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(width, width, 1))

    def forward(self, vertical: Tensor, horizontal: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, width, H, W] of both stacks, and of what is told of each cell, to the two stacks."""
        told_down, told_along = self.told(context).chunk(2, dim=1)
        below = self.down(F.pad(vertical, (self.reach, self.reach, self.reach, 0))) + told_down
        row = self.along(F.pad(horizontal, (self.reach, 0, 0, 0))) + told_along + self.link(_one_down(below))
        return gate(below), horizontal + self.out(gate(row))


class PixelCNN(Network):
    """One level.

    Args:
        grids: the one level that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        layers: gated layers. Each widens what a cell sees by half a kernel.
        width: channels.
        kernel: side of the kernels, odd.
        dropout: inside the layers.
    """

    units = (GatedLayer, Stack)

    def __init__(
        self,
        grids: Sequence[GridShape],
        classes: int,
        given: Sequence[GridShape] = (),
        *,
        layers: int,
        width: int,
        kernel: int,
        dropout: float,
    ) -> None:
        super().__init__(grids, classes, given)
        (self.grid,) = grids
        side = self.grid.side
        self.tokens = nn.Embedding(self.grid.codes, width)
        self.class_everywhere = nn.Embedding(classes + 1, width)  # the last one stands for "no class"
        self.positions = nn.ParameterList([nn.Parameter(torch.zeros(width, side, side))])
        self.condition = Conditioner(given, side, width) if given else None
        self.layers = nn.ModuleList(GatedLayer(width, kernel, dropout) for _ in range(layers))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, self.grid.codes, 1)
        )

    def forward(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """Logits [[B, side², K]] of every code given those before it in raster order."""
        context = self._context(given, classes)
        vertical = self.tokens(codes[0]).permute(0, 3, 1, 2)
        horizontal = F.pad(vertical, (1, 0, 0, 0))[..., :-1]
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, context)
        return [self.head(horizontal).flatten(2).transpose(1, 2)]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw code by code; the vertical stack runs once a row, the horizontal one over the new cell alone."""
        rows, uniforms = draws.rows(classes, self.no_class), draws.uniforms(self.grid.length).view_as(known[0])
        context = self._context([draws.spread(grid) for grid in given], rows)
        layers = [_Incremental(layer, context) for layer in self.layers if isinstance(layer, GatedLayer)]
        codes = known[0].clone()
        blank = context.new_zeros(len(rows), context.shape[1], self.grid.side)
        above = None
        for y in range(self.grid.side):
            below = blank if above is None else self.tokens(draws.spread(above)).transpose(1, 2)
            for layer in layers:
                below = layer.begin_row(y, below)
            cell = blank[..., 0]
            for x in range(self.grid.side):
                for layer in layers:
                    cell = layer.step(x, cell)
                logits = draws.guide(self.head(cell[..., None, None]).flatten(1))
                drawn = draws.codes(logits, uniforms[:, y, x])
                codes[:, y, x] = torch.where(codes[:, y, x] < 0, drawn, codes[:, y, x])
                cell = self.tokens(draws.spread(codes[:, y, x]))
            above = codes[:, y]
        return [codes]

    def _context(self, given: Sequence[Tensor], classes: Tensor) -> Tensor:
        """What is known of each cell beforehand: [B, width, side, side]."""
        known = self.class_everywhere(classes)[:, :, None, None] + self.positions[0]
        return known + self.condition(given) if self.condition is not None else known


class _Incremental:
    """A layer while codes are drawn: it keeps the last rows and cells that it has to look back at."""

    def __init__(self, layer: GatedLayer, context: Tensor) -> None:
        self._layer, self._reach = layer, layer.reach
        self._told_down, self._told_along = layer.told(context).chunk(2, dim=1)
        batch, width, side, _ = context.shape
        self._rows = context.new_zeros(batch, width, self._reach + 1, side + 2 * self._reach)
        self._cells = context.new_zeros(batch, width, side + self._reach)
        self._weight = layer.along.weight.flatten(1)
        self._row = context.new_empty(0)  # of the first row on: what the horizontal stack is told of its cells

    def begin_row(self, y: int, above: Tensor) -> Tensor:
        """Take in the row y - 1 of the vertical stack [B, width, side] (anything for y = 0), and return its output."""
        self._cells.zero_()
        if not y:
            self._row = self._told_along[:, :, 0] + self._linked(torch.zeros_like(self._told_down[:, :, 0]))
            return above
        self._rows = torch.cat([self._rows[:, :, 1:], F.pad(above, (self._reach, self._reach))[:, :, None]], dim=2)
        below = self._layer.down(self._rows)[:, :, 0] + self._told_down[:, :, y - 1]
        self._row = self._told_along[:, :, y] + self._linked(below)
        return gate(below)

    def step(self, x: int, cell: Tensor) -> Tensor:
        """The horizontal stack's cell x of this row: [B, width] to the same."""
        self._cells[:, :, x + self._reach] = cell
        window = self._cells[:, :, x : x + self._reach + 1].flatten(1)
        row = F.linear(window, self._weight, self._layer.along.bias) + self._row[:, :, x]
        return cell + self._layer.out(gate(row)[..., None, None]).flatten(1)

    def _linked(self, row: Tensor) -> Tensor:
        return self._layer.link(row[:, :, None])[:, :, 0]


def gate(x: Tensor) -> Tensor:
    """Tanh of the first half of the channels times the sigmoid of the second (equation 2)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


def _one_down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]
