"""Which cells of a grid are drawn together, in a fixed number of passes, and what they are told of those before.

`spread` is the order of ordered dithering (Bayer 1973): any first part of it is spread over the whole grid as evenly
as can be, from coarse to fine. So cells of one pass lie far apart, where they depend least on each other, and between
cells that are known (Reed et al. 2017, Parallel Multiscale Autoregressive Density Estimation; Besnier et al. 2025, the
Halton scheduler, with a Halton sequence). There are as many passes as one wants.

`wave` runs from the upper left corner to the lower right one: a cell is drawn a pass after its left neighbour, and the
row below follows two cells behind. So each cell knows its neighbours to the left and in the row above, as in raster
order, and those of one pass are a knight's move apart. There are 3 side - 2 passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

Order = Literal["spread", "wave"]

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: math.cos(done * math.pi / 2),
    "linear": lambda done: 1 - done,
}
"""Share of the codes that is still to be drawn when a share of the passes is done."""


def spread_order(side: int) -> Tensor:
    """Cells int64 [side²], in raster numbers, in the order in which they are drawn."""
    bits, line = (side - 1).bit_length(), torch.arange(side)
    rows, columns = line[:, None], line[None, :]
    rank = torch.zeros(side, side, dtype=torch.int64)
    for bit in range(bits):  # the lowest bits, which tell the finest lattices apart, weigh most
        diagonal, row = (rows ^ columns) >> bit & 1, (rows >> bit & 1).expand(side, side)
        rank |= (diagonal << 1 | row) << 2 * (bits - 1 - bit)
    return rank.flatten().argsort()


def pass_sizes(length: int, passes: int, schedule: str) -> list[int]:
    """How many cells each pass draws, never fewer than the one before; with more passes than cells, one each."""
    passes = min(passes, length)
    left = [int(length * SCHEDULES[schedule](number / passes)) for number in range(passes)] + [0]
    sizes = sorted(max(1, before - after) for before, after in pairwise(left))
    excess = sum(sizes) - length  # passes that would have been empty
    for number in reversed(range(passes)):
        less = min(excess, sizes[number] - 1)
        sizes[number] -= less
        excess -= less
    return sorted(sizes)


@dataclass(frozen=True)
class Passes:
    """The passes over one grid. Places are those in the order of drawing, T in number; cells are raster numbers."""

    order: Tensor
    """int64 [T]: the cell at each place."""
    starts: tuple[int, ...]
    """The place at which each pass begins, and T behind the last."""
    carried: Tensor
    """int64 [T]: the cell of the pass before whose code each place is given, T in the first; all codes are, unless the
    pass is smaller than the one before."""
    near: Tensor
    """int64 [T, window² - 1]: the cells around each place's; T outside of the grid."""
    seen: Tensor
    """bool, as `near`: whether it was drawn in a pass before; true outside of the grid."""

    @property
    def sizes(self) -> list[int]:
        """Cells of each pass."""
        return [stop - start for start, stop in pairwise(self.starts)]


def spread_parts(side: int, passes: int, schedule: str) -> list[Tensor]:
    """Cells of each pass in the order `spread`.

    Args:
        side: of the grid.
        passes: how many; at most as many as there are cells are made.
        schedule: key of `SCHEDULES`.
    """
    return list(spread_order(side).split(pass_sizes(side**2, passes, schedule)))


def wave_parts(side: int) -> list[Tensor]:
    """Cells of each pass in the order `wave`: those of one number 2 row + column."""
    line = torch.arange(side)
    number = (2 * line[:, None] + line).flatten()
    return [(number == one).nonzero().flatten() for one in range(3 * side - 2)]


def make_passes(side: int, parts: Sequence[Tensor], window: int) -> Passes:
    """What passes over a grid of `side`² cells need to know.

    Args:
        side: of the grid.
        parts: cells of each pass.
        window: odd side of the square around a cell that `near` is about.
    """
    order = torch.cat(list(parts))
    starts = [0, *accumulate(len(part) for part in parts)]
    number = torch.full((side**2 + 1,), -1)  # of the pass that draws a cell; outside of the grid none has to
    number[order] = torch.bucketize(torch.arange(side**2), torch.tensor(starts[1:]), right=True)
    near = _near(side, window)[order]
    return Passes(order, tuple(starts), _carried(order, side, starts), near, number[near] < number[order][:, None])


def _near(side: int, window: int) -> Tensor:
    """int64 [side², window² - 1]: the cells around each cell, side² for those outside of the grid."""
    reach = window // 2
    cells = torch.full((side + 2 * reach, side + 2 * reach), side**2)
    cells[reach : side + reach, reach : side + reach] = torch.arange(side**2).view(side, side)
    squares = cells.unfold(0, window, 1).unfold(1, window, 1).reshape(side**2, -1)
    return torch.cat([squares[:, : window**2 // 2], squares[:, window**2 // 2 + 1 :]], dim=1)


def _carried(order: Tensor, side: int, starts: list[int]) -> Tensor:
    """`Passes.carried`: each code goes to the nearest cell of the next pass that has none yet, the rest take theirs."""
    carried = torch.full_like(order, side**2)
    points = torch.stack([order // side, order % side], dim=1).float()
    for (start, middle), (_, stop) in pairwise(pairwise(starts)):
        far = torch.cdist(points[middle:stop], points[start:middle])
        nearest, free = far.argmin(dim=1), torch.zeros(stop - middle)
        for old in range(middle - start if middle - start <= stop - middle else 0):
            new = (far[:, old] + free).argmin()
            nearest[new], free[new] = old, torch.inf
        carried[middle:stop] = order[start:middle][nearest]
    return carried
