"""A recurrent network over one code grid: LSTM (Hochreiter & Schmidhuber 1997) or GRU (Cho et al. 2014), raster order.

All that a cell knows of the codes before it lies in the states, so a code is drawn at the same cost wherever it stands,
and memory does not grow with the codes either: the opposite of a transformer's cache. The code above is told besides,
as in the row LSTM of PixelRNN (van den Oord et al. 2016a, section 3.1): in raster order it lies a whole row back.
Layers are residual (section 3.3 there). Class, place and coarser levels are added to the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.conditioning import Conditioner
from vqscale.models.convnets import Stack
from vqscale.models.generate import Draws
from vqscale.models.network import CodeNetwork, GridShape
from vqscale.models.steady import steady_matrix

Cell = Literal["lstm", "gru"]
_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentLayer(nn.Module):
    """Layer norm, a recurrence along the sequence, added to the input.

    Args:
        width: channels, and size of the state.
        cell: which recurrence.
        dropout: on what is added.
    """

    def __init__(self, width: int, cell: Cell, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.recurrence = _CELLS[cell](width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same, fp32: a state goes through hundreds of steps, which bf16 would round each."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return x + self.dropout(self.recurrence(self.norm(x))[0])


class Recurrent(CodeNetwork):
    """One level.

    Args:
        grids: the one level that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        layers: recurrent layers.
        width: channels, and size of the states.
        cell: which recurrence.
        dropout: inside the layers.
    """

    units = (RecurrentLayer, Stack)

    def __init__(
        self,
        grids: Sequence[GridShape],
        classes: int,
        given: Sequence[GridShape] = (),
        *,
        layers: int,
        width: int,
        cell: Cell,
        dropout: float,
    ) -> None:
        super().__init__(grids, classes, given)
        (self.grid,) = grids
        self.left, self.above = nn.Embedding(self.grid.codes, width), nn.Embedding(self.grid.codes, width)
        self.class_everywhere = nn.Embedding(classes + 1, width)  # the last one stands for "no class"
        self.positions = nn.ParameterList([nn.Parameter(torch.zeros(self.grid.length, width))])
        self.condition = Conditioner(given, self.grid.side, width) if given else None
        self.layers = nn.ModuleList(RecurrentLayer(width, cell, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, self.grid.codes)

    def forward(self, given: Sequence[Tensor], codes: Sequence[Tensor], classes: Tensor) -> list[Tensor]:
        """Logits [[B, side², K]] of every code given those before it in raster order."""
        flat, side = codes[0].flatten(1), self.grid.side
        left = F.pad(self.left(flat[:, :-1]), (0, 0, 1, 0))
        above = F.pad(self.above(flat[:, :-side]), (0, 0, side, 0))
        x = left + above + self._context(classes, None if self.condition is None else self.condition(given))
        for layer in self.layers:
            x = layer(x)
        return [self.head(self.norm(x))]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw code by code, a step of the states each."""
        condition = None if self.condition is None else draws.spread(self.condition.apart(given))
        steps = Steps(self, self._context(draws.rows(classes, self.no_class), condition))
        uniforms = draws.uniforms(self.grid.length)
        scales = draws.sampling.scales(self.grid.length).to(classes.device)
        codes, side = known[0].flatten(1).clone(), self.grid.side
        for place in range(self.grid.length):
            left = draws.spread(codes[:, place - 1]) if place else None
            above = draws.spread(codes[:, place - side]) if place >= side else None
            drawn = draws.codes(draws.guide(steps.logits(place, left, above), scales[place]), uniforms[:, place])
            codes[:, place] = torch.where(codes[:, place] < 0, drawn, codes[:, place])
        return [codes.view_as(known[0])]

    def _context(self, classes: Tensor, condition: Tensor | None) -> Tensor:
        """What is known of each cell beforehand: [B, side², width]."""
        known = self.class_everywhere(classes)[:, None] + self.positions[0]
        return known if condition is None else known + condition.flatten(2).transpose(1, 2)


class Steps:
    """The network while codes are drawn. What it gives a row does not depend on others, nor its cost on the place.

    Args:
        network: in evaluation mode; its weights are those of the moment.
        context: what is known of each cell beforehand, [B, side², width].
    """

    def __init__(self, network: Recurrent, context: Tensor) -> None:
        self._network, self._context = network, context
        self._layers = [
            LayerSteps(layer, len(context)) for layer in network.layers if isinstance(layer, RecurrentLayer)
        ]
        self._head = steady_matrix(network.head.weight, network.head.bias)

    def logits(self, place: int, left: Tensor | None, above: Tensor | None) -> Tensor:
        """Logits [B, K] of a cell from the codes int64 [B] to its left and above it; None where there are none.

        "Left" of a row's first cell is the last one of the row before, as in the sequence that the forward sees.
        """
        x = self._context[:, place]
        x = x if left is None else x + self._network.left(left)
        x = x if above is None else x + self._network.above(above)
        for layer in self._layers:
            x = layer.step(x)
        return self._head(self._network.norm(x))


class LayerSteps:
    """A recurrent layer with its state, zero at first."""

    def __init__(self, layer: RecurrentLayer, batch: int) -> None:
        cells = layer.recurrence
        self._norm, self._step = layer.norm, self._lstm if isinstance(cells, nn.LSTM) else self._gru
        self._of_input = steady_matrix(cells.weight_ih_l0, cells.bias_ih_l0)
        self._of_state = steady_matrix(cells.weight_hh_l0, cells.bias_hh_l0)
        self._state = self._memory = cells.weight_ih_l0.new_zeros(batch, cells.hidden_size)

    def step(self, x: Tensor) -> Tensor:
        """The next cell of the sequence, [B, width] to the same."""
        self._state = self._step(self._of_input(self._norm(x)), self._of_state(self._state))
        return x + self._state

    def _lstm(self, of_input: Tensor, of_state: Tensor) -> Tensor:
        let_in, kept, new, let_out = (of_input + of_state).chunk(4, dim=1)  # torch's order of the gates
        self._memory = torch.sigmoid(kept) * self._memory + torch.sigmoid(let_in) * torch.tanh(new)
        return torch.sigmoid(let_out) * torch.tanh(self._memory)

    def _gru(self, of_input: Tensor, of_state: Tensor) -> Tensor:
        (reset, kept, new), (told_reset, told_kept, told_new) = of_input.chunk(3, dim=1), of_state.chunk(3, dim=1)
        new = torch.tanh(new + torch.sigmoid(reset + told_reset) * told_new)
        return torch.lerp(new, self._state, torch.sigmoid(kept + told_kept))
