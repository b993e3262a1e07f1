"""A flow over grey levels: RealNVP on dequantized codes, so that a density also runs directly on images.

The codes have to be ordered, as the values of pixels are. Noise inside of their bins makes them continuous
(`dequantize`), uniform or learned together with the flow; what is given is a bound of the probability of the codes, by
one draw of the noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.models.dequantize import Dequantizer, UniformNoise, VariationalNoise, dequantized_nats
from vqscale.models.generate import Draws
from vqscale.models.network import GridShape, Network, unknown
from vqscale.models.realnvp import Coupling, RealNVP

_HALF_STEP = 2.0**-25
"""Uniform numbers in fp32 are multiples of 2^-24; between two of them no quantile is infinite. In fp32 the last such
place is 1, so it takes fp64."""


class Dequantized(Network):
    """One level.

    Args:
        grids: the one level that it models.
        classes: number of classes; 0 for an unconditional prior.
        given: the coarser levels that it is conditioned on.
        couplings: of the flow.
        width: channels of the networks of flow and noise.
        noise: inside of the bins: uniform, or a flow that is told the codes.
        noise_couplings: of that flow.
    """

    units = (Coupling,)
    exact = False

    def __init__(
        self,
        grids: Sequence[GridShape],
        classes: int,
        given: Sequence[GridShape] = (),
        *,
        couplings: int,
        width: int,
        noise: str,
        noise_couplings: int,
    ) -> None:
        super().__init__(grids, classes, given)
        (self.grid,) = grids
        values = GridShape(self.grid.side, 0, 1)
        self.half_range, self.chances = self.grid.codes / 2, self.grid.values
        self.flow = RealNVP([values], classes, given, couplings=couplings, width=width)
        self.noise: Dequantizer = UniformNoise()
        if noise == "variational":
            self.noise = VariationalNoise(
                1, values.side, couplings=noise_couplings, width=width, half_range=self.half_range
            )

    def nats(
        self, given: Sequence[Tensor], latents: Sequence[Tensor], classes: Tensor, chance: Tensor, smoothing: float
    ) -> list[Tensor]:
        """What on average is at least -log P of the codes; `chance` says where in their bins they lie."""
        levels = latents[0][:, None].float()

        def density(values: Tensor) -> Tensor:
            return self.flow.nats(given, [values], classes, chance[:, :0], smoothing)[0]

        normals = torch.special.ndtri(chance.double() + _HALF_STEP).to(levels).view_as(levels)
        return [dequantized_nats(self.noise, density, levels, normals, self.half_range)]

    def sample(self, given: Sequence[Tensor], classes: Tensor, draws: Draws, known: Sequence[Tensor]) -> list[Tensor]:
        """Draw values, and take the codes whose bins they fall into; what lies outside of all, the nearest one."""
        nothing = unknown(self.flow.grid, len(classes), classes.device)
        (values,) = self.flow.sample(given, classes, draws, [nothing])
        codes = ((values[:, 0] + 1) * self.half_range).floor().clamp(0, self.grid.codes - 1).long()
        return [torch.where(known[0] < 0, codes, known[0])]
