"""The recurrent network: what a cell sees, that drawing step by step is the forward, and what a step costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqscale.models.generate import Draws, Sampling
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior
from vqscale.models.recurrent import Cell, Recurrent, Steps

TOP, GRID = GridShape(3, 5), GridShape(6, 7)
each_cell = pytest.mark.parametrize("cell", ["lstm", "gru"])


def make(cell: Cell, grid: GridShape = GRID, **settings: Any) -> Recurrent:
    torch.manual_seed(0)
    network = Recurrent([grid], 3, [TOP], **({"layers": 2, "width": 16, "dropout": 0.0} | settings), cell=cell).eval()
    for parameter in network.parameters():  # the initial scale is too small to tell positions apart
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def codes(batch: int, grid: GridShape, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(grid.codes, (batch, grid.side, grid.side), generator=generator)


@each_cell
@torch.no_grad()
def test_no_cell_sees_itself_or_what_follows(cell: Cell) -> None:
    network, top, classes = make(cell), codes(1, TOP), torch.tensor([1])
    # One sample for each cell that is changed: all of them in one forward.
    grid = codes(1, GRID).repeat(GRID.length, 1, 1)
    before = network([top], [grid[:1]], classes)[0]
    flat, cells = grid.view(GRID.length, -1), torch.arange(GRID.length)
    flat[cells, cells] = (flat[cells, cells] + 1) % GRID.codes
    (after,) = network([top.expand(GRID.length, -1, -1)], [grid], classes.expand(GRID.length))
    changed = (after - before).abs().amax(2) > 1e-6  # [cell that was changed, cell that is predicted]
    assert not changed.tril().any()
    # What follows at once and what stands below is told directly; the rest as long as the states remember it.
    assert changed.diagonal(1).all()
    assert changed.diagonal(GRID.side).all()


@each_cell
@torch.no_grad()
def test_drawing_step_by_step_follows_the_forward(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    network, top, classes = make(cell), codes(4, TOP), torch.tensor([0, 1, 2, 3])
    shown: list[Tensor] = []

    def watch(self: Draws, logits: Tensor, uniform: Tensor) -> Tensor:
        shown.append(logits)
        return drawn(self, logits, uniform)

    drawn = Draws.codes
    monkeypatch.setattr(Draws, "codes", watch)
    draws = Draws(Sampling(), [1, 2, 3, 4], classes.device)
    (grid,) = network.sample([top], classes, draws, [torch.full((4, GRID.side, GRID.side), -1)])
    (full,) = network([top], [grid], classes)
    torch.testing.assert_close(torch.stack(shown, dim=1), full, atol=1e-5, rtol=1e-5)


class Traffic(TorchDispatchMode):
    """Counts operations, and the numbers that go into them and come out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        self.operations += 1
        if not any(value.alias_info for value in operation._schema.returns):
            self.numbers += sum(leaf.numel() for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor))
        return out


@each_cell
@torch.no_grad()
def test_a_step_costs_the_same_wherever_it_stands(cell: Cell) -> None:
    """On grids of 36 and of 1,024 cells; views count no numbers, since nothing is touched."""
    costs = set()
    for side in (6, 32):
        network = make(cell, GridShape(side, 7))
        steps = Steps(network, torch.zeros(2, side**2, 16))
        for place in range(side**2):
            with Traffic() as traffic:
                steps.logits(place, torch.tensor([1, 2]), torch.tensor([3, 4]))
            costs.add((traffic.operations, traffic.numbers))
    assert len(costs) == 1
    assert costs.pop()[1] > 2 * 2 * 16  # it does count


@torch.no_grad()
def test_class_and_coarser_level_are_told() -> None:
    network, top, grid = make("lstm"), codes(1, TOP).expand(2, -1, -1), codes(1, GRID).expand(2, -1, -1)
    (logits,) = network([top], [grid], torch.tensor([0, 1]))
    assert ((logits[0] - logits[1]).abs().amax(1) > 1e-6).all()
    changed = top.clone()
    changed[1, 2, 2] = (changed[1, 2, 2] + 1) % TOP.codes  # the last cell over the grid
    (logits,) = network([changed], [grid], torch.tensor([0, 0]))
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-6


def test_dropout_acts_in_training_alone() -> None:
    network, arguments = make("lstm", dropout=0.5), ([codes(1, TOP)], [codes(1, GRID)], torch.tensor([0]))
    assert torch.equal(network(*arguments)[0], network(*arguments)[0])
    network.train()
    assert not torch.equal(network(*arguments)[0], network(*arguments)[0])


@each_cell
def test_it_learns_a_rule(cell: Cell) -> None:
    """Each code follows from the one above and the class; the first row is chance, 4 · log 8 nats."""
    torch.manual_seed(0)
    grid, rows = GridShape(4, 8), torch.arange(4)[None, :, None]
    prior = Prior([Recurrent([grid], 4, layers=1, width=32, cell=cell, dropout=0.0)])
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(150):
        classes, first = torch.randint(4, (64,)), torch.randint(8, (64, 1, 4))
        loss = prior([(first + rows * (classes[:, None, None] + 1)) % 8], classes)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 4 * math.log(8) - 0.3 < loss.item() < 4 * math.log(8) + 2  # of 12 codes that were worth 25 nats
