"""Inverse autoregressive flow (Kingma et al. 2016) over one level of continuous latents: a MAF the other way round.

Each map scales and shifts a value by what a network makes of the noise before it (section 3), so drawing takes one
forward whatever the size of the grid, and a density has to invert it: value i follows from those before it. They are
found all at once by Jacobi iteration u <- (z - t(u)) exp(-s(u)) (Song et al. 2021): after k rounds the first k values
are right, and as a rule a few rounds do for all.

The gradient of what was found follows from the implicit function theorem (Bai et al. 2019, theorem 1): with J the
Jacobian of a round, a gradient g at the fixed point becomes (I - J^T)^-1 g = g + J^T g + ..., which ends since J is
strictly triangular. So neither time nor memory of the backward pass grows with the rounds behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqscale.models.maf import Autoregression, AutoregressiveFlow, turned

_CLOSE = 4
"""Roundings of the largest value that two rounds may differ by where the last one ends."""


class IAF(AutoregressiveFlow):
    """Inverse autoregressive flow: drawing takes one forward a map, a density some rounds of it."""

    def to_noise(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """All maps inverted, the last one first; as `Flow.to_noise`."""
        u, total = z, z.new_zeros(len(z))
        for number, each in reversed(list(enumerate(self.maps))):
            assert isinstance(each, Autoregression)
            turn = number % 2 == 1
            told = turned(context, turn, channels=False)
            u = inverted(each, turned(u, turn), told)
            total = total - each.changes(u, told)[0].flatten(1).sum(1)
            u = turned(u, turn)
        return u, total

    def from_noise(self, u: Tensor, context: Tensor) -> Tensor:
        """All maps in a row, one sample at a time: a convolution's rounding may depend on the batch."""
        return torch.cat([self._drawn(*one) for one in zip(u.split(1), context.split(1), strict=True)])

    def _drawn(self, u: Tensor, context: Tensor) -> Tensor:
        for number, each in enumerate(self.maps):
            turn = number % 2 == 1
            z, _ = each(turned(u, turn), turned(context, turn, channels=False))
            u = turned(z, turn)
        return u


def inverted(one: Autoregression, z: Tensor, context: Tensor) -> Tensor:
    """The u that a map takes to z, both [B, channels, side, side] in fp32 or wider; differentiable once."""

    def round_of(u: Tensor) -> Tensor:
        log_scale, shift = one.changes(u, context)
        return (z - shift) * (-log_scale).exp()

    most = z[0].numel()
    with torch.no_grad():
        found = _settled(round_of, z, most)
    if not torch.is_grad_enabled():
        return found
    u, start = round_of(found), found.detach().requires_grad_()
    again = round_of(start)

    def through(gradient: Tensor) -> Tensor:
        def more(total: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(again, start, total, retain_graph=True)
            return gradient + back

        return _settled(more, gradient, most)

    if u.requires_grad:
        u.register_hook(through)
    return u


def _settled(round_of: Callable[[Tensor], Tensor], values: Tensor, most: int) -> Tensor:
    """What stays as it is; after so many rounds, one for each value, whatever there is."""
    for _ in range(most):
        found = round_of(values)
        change, size = (found - values).abs().max(), found.abs().max()
        values = found
        if bool(change <= _CLOSE * torch.finfo(found.dtype).eps * size):
            break
    return values
