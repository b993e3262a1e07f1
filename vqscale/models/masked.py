"""Masked prediction of one code grid, drawn in a few passes (MaskGIT, Chang et al. 2022).

A transformer that sees in all directions predicts the codes that are masked from those that are not; a convolution
tells each cell its neighbours, which attention would first have to find. In training the number of masked codes is
drawn evenly from 1 to all T. Then T times the mean of their losses is, on average, the nats of the grid in a random
order: an upper bound of its nats under all orders together (Hoogeboom et al. 2021, Autoregressive Diffusion Models).
To draw, all masked codes are drawn at once, and those stay that the network is surest of (Chang et al., section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.conditioning import Conditioner
from vqscale.models.convnets import Stack
from vqscale.models.generate import LOGIT_BYTES, Draws
from vqscale.models.network import CodeNetwork, GridShape, nats
from vqscale.models.pass_order import SCHEDULES
from vqscale.models.steady import steady
from vqscale.models.steady_block import SteadyBlock
from vqscale.models.transformer_block import (
    Block,
    Feed,
    Norm,
    Positions,
    Shape,
    attend,
    make_norm,
)
from vqscale.models.transformer_body import turns_of


class Masked(CodeNetwork):
    """One level.

    Args:
        grids: the one level that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        layers, width, ...: size and architecture, explained at `Shape`.
        passes: forward passes that a grid is drawn in.
        schedule: key of `pass_order.SCHEDULES`.
        choice_temperature: scale of the Gumbel noise on the log-probabilities by which codes are kept. It falls
            linearly to none in the last pass.
    """

    units = (Block, Stack)
    exact = False

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
        passes: int,
        schedule: str,
        choice_temperature: float,
    ) -> None:
        super().__init__(grids, classes, given)
        shape = self.shape = Shape(layers, width, heads, dropout, key_value_heads, norm, feed, feed_width, positions)
        (self.grid,) = grids
        self.chances = 1 + self.grid.length
        self.passes, self.schedule, self.choice_temperature = passes, SCHEDULES[schedule], choice_temperature
        self.tokens = nn.Embedding(self.grid.codes + 1, width)  # the last one stands for a masked code
        self.around = nn.Conv2d(width, width, 3, padding=1)
        self.class_everywhere = nn.Embedding(classes + 1, width)  # the last one stands for "no class"
        count = self.grid.length if positions == "learned" else 1
        self.positions = nn.ParameterList([nn.Parameter(torch.zeros(count, width))])
        self.register_buffer(
            "turns", turns_of(grids, shape.head_width) if positions == "rotary" else None, persistent=False
        )
        self.turns: Tensor | None
        self.condition = Conditioner(given, self.grid.side, width) if given else None
        self.blocks = nn.ModuleList(Block(shape, causal=False) for _ in range(layers))
        self.norm = make_norm(shape)
        self.head = nn.Linear(width, self.grid.codes, bias=False)
        for table in (self.tokens, self.class_everywhere, self.head):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """Logits [[B, side², K]] of every code given those that are not masked, which negative ones are."""
        condition = None if self.condition is None else self.condition(given)
        cells = self.embedded(codes[0].flatten(1))
        grid = cells.transpose(1, 2).unflatten(2, (self.grid.side, self.grid.side))
        x = cells + self.around(grid).flatten(2).transpose(1, 2) + self._context(classes, condition)
        for block in self.blocks:
            x = block(x, self.turns)
        return [self.head(self.norm(x))]

    def nats(
        self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """An estimate of the bound, from one set of masked codes a sample: [[B]]."""
        flat, length = codes[0].flatten(1), self.grid.length
        count = 1 + (chance[:, :1] * length).long().clamp(max=length - 1)
        masked = chance[:, 1:].argsort(dim=1).argsort(dim=1) < count
        (logits,) = self(given, [torch.where(masked, -1, flat)], classes)
        losses = nats(logits, flat, smoothing) * masked
        return [losses.sum(dim=1) * length / count[:, 0]]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw all codes that are masked, keep the surest, and again."""
        condition = None if self.condition is None else draws.spread(self.condition.apart(given))
        steps = MaskedSteps(self, self._context(draws.rows(classes, self.no_class), condition), draws.dtype)
        scales = draws.sampling.scales(self.passes).to(classes.device)
        uniforms = draws.uniforms(2 * self.passes * self.grid.length).view(len(classes), self.passes, 2, -1)
        codes = known[0].flatten(1)
        free = (codes < 0).sum(dim=1, keepdim=True)
        for number in range(self.passes):
            done = (number + 1) / self.passes
            logits = draws.guide(steps.logits(draws.spread(codes)), scales[number])
            drawn = draws.codes(logits.flatten(0, 1), uniforms[:, number, 0].flatten()).view_as(codes)
            sure = torch.log_softmax(logits.double(), dim=-1).gather(2, drawn[..., None])[..., 0]
            gumbel = -torch.log(-torch.log(uniforms[:, number, 1].clamp(1e-12, 1 - 1e-12)))
            sure = sure + (1 - done) * self.choice_temperature * gumbel
            left = self._left(free, (codes < 0).sum(dim=1, keepdim=True), done)
            codes = _keep_surest(codes, drawn, sure, left)
        return [codes.view_as(known[0])]

    def row_bytes(self, dtype: torch.dtype) -> int:
        """The logits of all cells, and what a block makes of them."""
        inside = 4 * self.shape.width + 2 * self.shape.inner
        return self.grid.length * (LOGIT_BYTES * self.grid.codes + 4 * inside)

    def _left(self, free: Tensor, masked: Tensor, done: float) -> Tensor:
        """How many codes [B, 1] stay masked: by the schedule, but at least one is kept in each pass."""
        wanted = (free * self.schedule(done)).long() if done < 1 else torch.zeros_like(free)
        return torch.minimum(wanted, masked - 1).clamp(min=0)

    def _context(self, classes: Tensor, condition: Tensor | None) -> Tensor:
        """What is known of each cell beforehand: [B, side², width]."""
        known = self.class_everywhere(classes)[:, None] + self.positions[0]
        return known if condition is None else known + condition.flatten(2).transpose(1, 2)

    def embedded(self, flat: Tensor) -> Tensor:
        """Codes int64 [B, side²], negative where they are masked, as vectors of the residual stream."""
        return self.tokens(torch.where(flat < 0, self.grid.codes, flat))


class MaskedSteps:
    """The network while codes are drawn. What it gives a sample does not depend on the others.

    Args:
        network: in evaluation mode; its weights are those of the moment.
        context: what is known of each cell beforehand, [B, side², width].
        dtype: of the matrices; None: that of the weights.
    """

    def __init__(self, network: Masked, context: Tensor, dtype: torch.dtype | None = None) -> None:
        self._network, self._context = network, context
        self._around, self._head = steady(network.around, dtype), steady(network.head, dtype)
        self._blocks = [SteadyBlock(block, dtype) for block in network.blocks if isinstance(block, Block)]

    def logits(self, flat: Tensor) -> Tensor:
        """Logits [B, side², K] of codes [B, side²], negative where they are masked."""
        cells, side = self._network.embedded(flat), self._network.grid.side
        windows = F.unfold(cells.transpose(1, 2).unflatten(2, (side, side)), 3, padding=1).transpose(1, 2)
        x = cells + self._around(windows) + self._context
        for block in self._blocks:
            x = block(x, self._network.turns, _see_all)
        return self._head(self._network.norm(x))


def _see_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend(query, key, value, causal=False)


def _keep_surest(codes: Tensor, drawn: Tensor, sure: Tensor, left: Tensor) -> Tensor:
    """Fill masked codes [B, T] with drawn ones, but for the `left` [B, 1] that are the least sure."""
    sure = sure.masked_fill(codes >= 0, torch.inf)
    stays_masked = sure.argsort(dim=1, stable=True).argsort(dim=1) < left
    return torch.where((codes < 0) & ~stays_masked, drawn, codes)
