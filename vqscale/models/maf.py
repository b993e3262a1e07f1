"""Masked autoregressive flow (Papamakarios et al. 2017) over one level of continuous latents.

Each map scales and shifts a value by what a network makes of the values before it, in raster order and then by channel,
so its Jacobian is triangular and its density takes one forward. Drawing goes value by value; an inverse autoregressive
flow (`iaf`) has it the other way round. Every second map reads the values backwards.

The network is a gated PixelCNN for the cells before (van den Oord et al. 2016b), and a MADE (Germain et al. 2015) for
the channels before in the same cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.density import Flow, bounded
from vqscale.models.network import GridShape
from vqscale.models.pixelcnn import GatedLayer, LayerSteps
from vqscale.models.steady import steady, steady_matrix


class WithinCell(nn.Module):
    """Log scale and shift of each channel from the cells before and the channels before.

    Hidden unit k has the degree k mod channels: it sees the channels below its degree, and those from it on see the
    unit (MADE, equations 8 and 9, with degree 0 for units that see the cells before alone). The last layer begins at
    zero.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.past, self.before, self.last = (
            nn.Linear(width, width),
            nn.Linear(channels, width, bias=False),
            nn.Linear(width, 2 * channels),
        )
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        degrees, places = torch.arange(width) % channels, torch.arange(channels)
        self.register_buffer("seen", places < degrees[:, None], persistent=False)
        self.register_buffer("told", (degrees <= places[:, None]).repeat(2, 1), persistent=False)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The two masked ones: [width, channels] and [2 · channels, width]."""
        assert isinstance(self.seen, Tensor)
        assert isinstance(self.told, Tensor)
        return self.before.weight * self.seen, self.last.weight * self.told

    def forward(self, past: Tensor, z: Tensor) -> Tensor:
        """[B, 2 · channels, side, side] of what the cells before say [B, width, side, side], and values z."""
        first, last = self.matrices()
        hidden = torch.relu(self.past(past.permute(0, 2, 3, 1)) + F.linear(z.permute(0, 2, 3, 1), first))
        return F.linear(hidden, last, self.last.bias).permute(0, 3, 1, 2)


class Autoregression(nn.Module):
    """One map: u = z · exp(s(before, context)) + t(before, context).

    Args:
        channels: of the values.
        layers: gated layers.
        width: channels of the network and of the context.
        kernel: odd side of its kernels, half of which is cut away.
    """

    def __init__(self, channels: int, layers: int, width: int, kernel: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, 1)
        self.layers = nn.ModuleList(GatedLayer(width, kernel, 0.0) for _ in range(layers))
        self.within = WithinCell(channels, width)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Values [B, channels, side, side] on the way to noise, and log |det| [B], in fp32 or wider."""
        log_scale, shift = self.changes(z, context)
        return z * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def changes(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale and shift of each value by those before it, [B, channels, side, side] each."""
        values = z.to(context.dtype)
        vertical = self.embed(values)
        horizontal = F.pad(vertical, (1, 0, 0, 0))[..., :-1]
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, context)
        log_scale, shift = self.within(horizontal, values).to(z.dtype).chunk(2, dim=1)
        return bounded(log_scale), shift

    def back(self, u: Tensor, context: Tensor) -> Tensor:
        """The inverse, value by value, sample by sample the same in any batch."""
        cells, embed = context.permute(0, 2, 3, 1), steady(self.embed)
        layers = [LayerSteps(layer, cells) for layer in self.layers if isinstance(layer, GatedLayer)]
        within, z = CellSteps(self.within), u.permute(0, 2, 3, 1).clone()
        blank = torch.zeros_like(cells[:, 0])
        for y in range(z.shape[1]):
            vertical = embed(z[:, y - 1].to(context.dtype)) if y else blank
            for layer in layers:
                vertical = layer.begin_row(y, vertical)
            for x in range(z.shape[2]):
                cell = embed(z[:, y, x - 1].to(context.dtype)) if x else blank[:, 0]
                for layer in layers:
                    cell = layer.step(x, cell)
                z[:, y, x] = within.back(cell, z[:, y, x])
        return z.permute(0, 3, 1, 2).contiguous()


class CellSteps:
    """A `WithinCell` while values are drawn."""

    def __init__(self, layer: WithinCell) -> None:
        first, last = layer.matrices()
        self._past, self._before = steady(layer.past), steady_matrix(first, None)
        self._last = steady_matrix(last, layer.last.bias)

    def back(self, past: Tensor, u: Tensor) -> Tensor:
        """Values [B, channels] of a cell from what goes to noise there, and what the cells before say [B, width]."""
        told, z = self._past(past), torch.zeros_like(u)
        for channel in range(u.shape[1]):
            found = self._last(torch.relu(told + self._before(z.to(past.dtype)))).to(u.dtype)
            log_scale, shift = found.chunk(2, dim=1)
            z[:, channel] = (u - shift)[:, channel] * (-bounded(log_scale[:, channel])).exp()
        return z


class AutoregressiveFlow(Flow):
    """One level: maps in a row, every other one in the opposite order.

    Args:
        grids: the one level that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        maps: how many; two have met both orders.
        layers: gated layers in the network of each. A cell sees half a kernel further with each.
        width: channels of the networks.
        kernel: side of their kernels, odd.
    """

    def __init__(
        self,
        grids: Sequence[GridShape],
        classes: int,
        given: Sequence[GridShape] = (),
        *,
        maps: int,
        layers: int,
        width: int,
        kernel: int,
    ) -> None:
        super().__init__(grids, classes, given, width)
        self.maps = nn.ModuleList(Autoregression(self.grid.channels, layers, width, kernel) for _ in range(maps))


class MAF(AutoregressiveFlow):
    """Masked autoregressive flow: a density takes one forward a map, drawing one a value."""

    units = (GatedLayer,)

    def to_noise(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """All maps in a row; as `Flow.to_noise`."""
        u, total = z, z.new_zeros(len(z))
        for number, each in enumerate(self.maps):
            turn = number % 2 == 1
            u, log_determinant = each(turned(u, turn), turned(context, turn, channels=False))
            u, total = turned(u, turn), total + log_determinant
        return u, total

    def from_noise(self, u: Tensor, context: Tensor) -> Tensor:
        """All maps back."""
        z = u
        for number, each in reversed(list(enumerate(self.maps))):
            assert isinstance(each, Autoregression)
            turn = number % 2 == 1
            z = turned(each.back(turned(z, turn), turned(context, turn, channels=False)), turn)
        return z


def turned(values: Tensor, turn: bool, channels: bool = True) -> Tensor:
    """The values [B, channels, side, side] read backwards, if they are to be."""
    if not turn:
        return values
    return values.flip(1, 2, 3) if channels else values.flip(2, 3)
