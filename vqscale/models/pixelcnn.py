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
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.conditioning import Conditioner
from vqscale.models.convnets import Stack
from vqscale.models.generate import Draws
from vqscale.models.network import CodeNetwork, GridShape
from vqscale.models.steady import steady


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
        self.dropout, self.project = nn.Dropout(dropout), nn.Conv2d(width, width, 1)

    def forward(self, vertical: Tensor, horizontal: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, width, H, W] of both stacks, and of what is told of each cell, to the two stacks."""
        told_down, told_along = self.told(context).chunk(2, dim=1)
        below = self.down(F.pad(vertical, (self.reach, self.reach, self.reach, 0))) + told_down
        row = self.along(F.pad(horizontal, (self.reach, 0, 0, 0))) + told_along + self.link(_one_down(below))
        return gate(below, 1), horizontal + self.project(self.dropout(gate(row, 1)))


class PixelCNN(CodeNetwork):
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
        context = self._context(classes, None if self.condition is None else self.condition(given))
        vertical = self.tokens(codes[0]).permute(0, 3, 1, 2)
        horizontal = F.pad(vertical, (1, 0, 0, 0))[..., :-1]
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, context)
        return [self.head(horizontal).flatten(2).transpose(1, 2)]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw code by code; the vertical stack runs once a row, the horizontal one over the new cell alone."""
        condition = None if self.condition is None else draws.spread(self.condition.apart(given))
        context = self._context(draws.rows(classes, self.no_class), condition)
        uniforms = draws.uniforms(self.grid.length).view_as(known[0])
        scales = draws.sampling.scales(self.grid.length).view_as(known[0][0]).to(classes.device)
        steps, codes = PixelSteps(self, context), known[0].clone()
        for y in range(self.grid.side):
            steps.begin_row(y, draws.spread(codes[:, y - 1]))
            for x in range(self.grid.side):
                logits = draws.guide(steps.logits(x, draws.spread(codes[:, y, x - 1])), scales[y, x])
                drawn = draws.codes(logits, uniforms[:, y, x])
                codes[:, y, x] = torch.where(codes[:, y, x] < 0, drawn, codes[:, y, x])
        return [codes]

    def _context(self, classes: Tensor, condition: Tensor | None) -> Tensor:
        """What is known of each cell beforehand: [B, width, side, side]."""
        known = self.class_everywhere(classes)[:, :, None, None] + self.positions[0]
        return known if condition is None else known + condition


def gate(x: Tensor, dim: int = -1) -> Tensor:
    """Tanh of the first half of the channels times the sigmoid of the second (equation 2)."""
    a, b = x.chunk(2, dim=dim)
    return torch.tanh(a) * torch.sigmoid(b)


def _one_down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


class Stacks(Protocol):
    """What cells are drawn by."""

    @property
    def tokens(self) -> nn.Module:
        """From what stands in cells [B, ...] to [B, ..., width]."""

    @property
    def layers(self) -> nn.ModuleList:
        """Gated layers."""

    @property
    def head(self) -> nn.Sequential:
        """From the horizontal stack to what is said of a cell: two convolutions of one cell, each behind a ReLU."""


class PixelSteps:
    """A PixelCNN while codes are drawn, cell by cell in raster order. What it gives a row does not depend on others.

    Args:
        network: in evaluation mode; its weights are those of the moment.
        context: what is known of each cell beforehand, [B, width, side, side].
    """

    def __init__(self, network: Stacks, context: Tensor) -> None:
        cells = context.permute(0, 2, 3, 1)
        self._tokens, self._blank = network.tokens, torch.zeros_like(cells[:, 0])
        self._layers = [LayerSteps(layer, cells) for layer in network.layers if isinstance(layer, GatedLayer)]
        self._head = [steady(part) for part in network.head if isinstance(part, nn.Conv2d)]

    def begin_row(self, y: int, above: Tensor) -> None:
        """Take in the row above, codes int64 [B, side] or what else stands there; of the first row anything."""
        vertical = self._tokens(above) if y else self._blank
        for layer in self._layers:
            vertical = layer.begin_row(y, vertical)

    def logits(self, x: int, left: Tensor) -> Tensor:
        """Logits [B, K] of cell x of this row, given what stands to its left [B]; in the first column anything."""
        cell = self._tokens(left) if x else self._blank[:, 0]
        for layer in self._layers:
            cell = layer.step(x, cell)
        first, last = self._head
        return last(torch.relu(first(torch.relu(cell))))


class LayerSteps:
    """A gated layer with the rows and cells that it has to look back at."""

    def __init__(self, layer: GatedLayer, context: Tensor) -> None:
        batch, side, _, width = context.shape
        self._reach = layer.reach
        self._down, self._along, self._link = steady(layer.down), steady(layer.along), steady(layer.link)
        self._out = steady(layer.project)
        self._told_down, self._told_along = steady(layer.told)(context).chunk(2, dim=-1)
        self._rows = context.new_zeros(batch, width, layer.reach + 1, side + 2 * layer.reach)
        self._cells = context.new_zeros(batch, width, side + layer.reach)
        self._row = self._told_along[:, 0]

    def begin_row(self, y: int, above: Tensor) -> Tensor:
        """The row above of the vertical stack, [B, side, width], to the same of the next layer; of no use for y = 0."""
        self._cells.zero_()
        if not y:  # the vertical stack has nothing to tell, but the link has a bias
            self._row = self._told_along[:, 0] + self._link(torch.zeros_like(self._told_down[:, 0]))
            return above
        padded = F.pad(above.transpose(1, 2), (self._reach, self._reach))
        self._rows = torch.cat([self._rows[:, :, 1:], padded[:, :, None]], dim=2)
        windows = self._rows.unfold(3, 2 * self._reach + 1, 1).permute(0, 3, 1, 2, 4)
        below = self._down(windows.flatten(2)) + self._told_down[:, y - 1]
        self._row = self._told_along[:, y] + self._link(below)
        return gate(below)

    def step(self, x: int, cell: Tensor) -> Tensor:
        """The horizontal stack's cell x of this row, [B, width], to the same of the next layer."""
        self._cells[:, :, x + self._reach] = cell
        window = self._cells[:, :, x : x + self._reach + 1].flatten(1)
        return cell + self._out(gate(self._along(window) + self._row[:, x]))
