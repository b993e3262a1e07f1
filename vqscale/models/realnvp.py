"""RealNVP (Dinh et al. 2017, Density estimation using Real NVP) over one level of continuous latents.

A coupling leaves a part of the values as they are, and scales and shifts the others by what a network makes of that
part (section 3.2): it is inverted without inverting the network, and its Jacobian is triangular. The parts are the two
colours of a checkerboard and the two halves of the channels in turn (section 3.4). The paper's squeezing and factoring
out are left out: latents are small grids already, and levels are what their scales would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from vqscale.models.density import Flow, bounded
from vqscale.models.network import GridShape
from vqscale.models.steady import steady_convolution


class Coupling(nn.Module):
    """One coupling: u = z · exp(s(kept, context)) + t(kept, context) outside of what is kept.

    The network is that of Glow (Kingma & Dhariwal 2018, appendix B): its last layer begins at zero, so that a coupling
    begins as the identity.

    Args:
        kept: bool [channels, side, side], what stays as it is.
        width: channels of the network and of the context.
    """

    def __init__(self, kept: Tensor, width: int) -> None:
        super().__init__()
        channels = len(kept)
        self.register_buffer("kept", kept.clone(), persistent=False)  # its own: parts come back in later couplings
        self.look = nn.Conv2d(channels, width, 3, padding=1)
        self.told = nn.Conv2d(width, width, 1)
        self.mix = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, 2 * channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Values [B, channels, side, side] on the way to noise, and log |det| [B], in fp32 or wider."""
        seen = self.look(self._masked(z).to(context.dtype)) + self.told(context)
        log_scale, shift = self._changes(self.last(torch.relu(self.mix(torch.relu(seen)))), z.dtype)
        return z * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def back(self, u: Tensor, context: Tensor) -> Tensor:
        """The inverse, sample by sample the same in any batch."""
        look, told, mix, last = (steady_convolution(part) for part in (self.look, self.told, self.mix, self.last))
        seen = look(self._masked(u).to(context.dtype)) + told(context)
        log_scale, shift = self._changes(last(torch.relu(mix(torch.relu(seen)))), u.dtype)
        return (u - shift) * (-log_scale).exp()

    def _masked(self, values: Tensor) -> Tensor:
        assert isinstance(self.kept, Tensor)
        return values * self.kept

    def _changes(self, found: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Log scale and shift, both zero for what is kept."""
        assert isinstance(self.kept, Tensor)
        log_scale, shift = found.to(dtype).chunk(2, dim=1)
        return bounded(log_scale) * ~self.kept, shift * ~self.kept


class RealNVP(Flow):
    """One level.

    Args:
        grids: the one level that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        couplings: how many; 4 of them have met every kind of part.
        width: channels of their networks.
    """

    units = (Coupling,)

    def __init__(
        self,
        grids: Sequence[GridShape],
        classes: int,
        given: Sequence[GridShape] = (),
        *,
        couplings: int,
        width: int,
    ) -> None:
        super().__init__(grids, classes, given, width)
        parts = islice(cycle(kept_parts(self.grid)), couplings)
        self.couplings = nn.ModuleList(Coupling(kept, width) for kept in parts)

    def to_noise(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """All couplings in a row; as `Flow.to_noise`."""
        u, total = z, z.new_zeros(len(z))
        for coupling in self.couplings:
            u, log_determinant = coupling(u, context)
            total = total + log_determinant
        return u, total

    def from_noise(self, u: Tensor, context: Tensor) -> Tensor:
        """All couplings back."""
        z = u
        for coupling in reversed(self.couplings):
            assert isinstance(coupling, Coupling)
            z = coupling.back(z, context)
        return z


def kept_parts(grid: GridShape) -> list[Tensor]:
    """What couplings keep in turn: bool [channels, side, side] each.

    A single value has no other to depend on; then nothing is kept, and a coupling is an affine map that class and
    coarser levels choose.
    """
    board = torch.arange(grid.side)[:, None] + torch.arange(grid.side)[None]
    board = (board % 2 == 0).expand(grid.channels, -1, -1)
    first = (torch.arange(grid.channels) < grid.channels // 2)[:, None, None].expand_as(board)
    parts = [part.clone() for half in (board, first) for part in (half, ~half) if half.any() and not half.all()]
    return parts or [torch.zeros_like(board)]
