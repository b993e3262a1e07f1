"""What a network is told of the coarser levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.models.convnets import ResidualBlock, Stack
from vqscale.models.network import GridShape


class Projection(nn.Linear):
    """Continuous latents [B, channels, side, side] to [B, side, side, width], where codes have their embedding."""

    def forward(self, latents: Tensor) -> Tensor:
        """The channels of every cell by one matrix."""
        return super().forward(latents.permute(0, 2, 3, 1).to(self.weight.dtype))


class Conditioner(nn.Module):
    """Coarser levels as channels on a finer grid (Razavi et al. 2019, section 3.2).

    Codes are embedded, continuous latents projected; two residual blocks look around on the finest of the given grids,
    and each cell of the finer grid takes what stands over it.

    Args:
        given: the coarser levels, the coarsest first.
        side: of the finer grid.
        width: channels.
    """

    def __init__(self, given: Sequence[GridShape], side: int, width: int) -> None:
        super().__init__()
        self.side, self.finest = side, given[-1].side
        self.codes = nn.ModuleList(
            Projection(grid.channels, width) if grid.continuous else nn.Embedding(grid.codes, width) for grid in given
        )
        self.blocks = Stack(ResidualBlock(width, width), ResidualBlock(width, width))

    def forward(self, given: Sequence[Tensor]) -> Tensor:
        """[B, width, side, side] of the latents of each given level."""
        grids = [table(grid).permute(0, 3, 1, 2) for table, grid in zip(self.codes, given, strict=True)]
        together = sum((F.interpolate(grid, size=self.finest) for grid in grids[:-1]), start=grids[-1])
        return F.interpolate(self.blocks(together), size=self.side)

    def apart(self, given: Sequence[Tensor]) -> Tensor:
        """As `forward`, one sample at a time: a convolution's rounding may depend on the batch."""
        return torch.cat([self(list(one)) for one in zip(*(grid.split(1) for grid in given), strict=True)])
