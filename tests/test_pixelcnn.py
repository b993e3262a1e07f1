"""The gated PixelCNN: what a cell sees, and that drawing cell by cell is the forward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vqscale.models.generate import Draws, Sampling
from vqscale.models.network import GridShape
from vqscale.models.pixelcnn import PixelCNN
from vqscale.models.prior import Prior

TOP, GRID = GridShape(3, 5), GridShape(6, 7)


def make(**settings: Any) -> PixelCNN:
    torch.manual_seed(0)
    network = PixelCNN([GRID], 3, [TOP], **({"layers": 4, "width": 16, "kernel": 3, "dropout": 0.0} | settings)).eval()
    for parameter in network.parameters():  # the initial scale is too small to tell positions apart
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def codes(batch: int, grid: GridShape, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(grid.codes, (batch, grid.side, grid.side), generator=generator)


@pytest.mark.parametrize("kernel", [3, 5])
@torch.no_grad()
def test_no_cell_sees_itself_or_what_follows(kernel: int) -> None:
    network, top, classes = make(kernel=kernel), codes(1, TOP), torch.tensor([1])
    # One sample for each cell that is changed: all of them in one forward.
    grid = codes(1, GRID).repeat(GRID.length, 1, 1)
    before = network([top], [grid[:1]], classes)[0]
    flat, cells = grid.view(GRID.length, -1), torch.arange(GRID.length)
    flat[cells, cells] = (flat[cells, cells] + 1) % GRID.codes
    (after,) = network([top.expand(GRID.length, -1, -1)], [grid], classes.expand(GRID.length))
    changed = (after - before).abs().amax(2) > 1e-6  # [cell that was changed, cell that is predicted]
    assert not changed.tril().any()
    assert changed[:-1].any(1).all()


def seen(network: PixelCNN, y: int, x: int) -> Tensor:
    """Which cells' codes the logits of one cell depend on, by their gradient: bool [side, side]."""
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    handle = network.tokens.register_forward_hook(keep)
    (logits,) = network([codes(1, TOP)], [codes(1, GRID)], torch.tensor([0]))
    logits.view(GRID.side, GRID.side, -1)[y, x].square().sum().backward()
    handle.remove()
    assert embedded[0].grad is not None
    return embedded[0].grad[0].abs().sum(-1) > 0


@pytest.mark.parametrize(("layers", "kernel"), [(1, 3), (2, 3), (1, 5), (3, 3)])
def test_there_is_no_blind_spot(layers: int, kernel: int) -> None:
    """Layer by layer a cell sees half a kernel further up, to the left, and above to the right."""
    network, reach = make(layers=layers, kernel=kernel), layers * (kernel // 2)
    for y, x in ((5, 2), (3, 0), (5, 5), (0, 4)):
        rows, columns = torch.arange(GRID.side)[:, None], torch.arange(GRID.side)[None]
        above = (rows < y) & (rows >= y - 1 - reach) & ((columns - x).abs() <= reach)
        left = (rows == y) & (columns < x) & (columns >= x - 1 - reach)
        # The link hands on what the vertical stack knows below cells to the left, too.
        wider = (rows < y) & (rows >= y - 1 - reach) & (columns < x) & (columns >= x - 2 * reach)
        found = seen(network, y, x)
        assert found[above | left].all()
        assert not found[~(above | left | wider)].any()


@torch.no_grad()
def test_drawing_cell_by_cell_follows_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    network, top, classes = make(kernel=5, layers=3), codes(4, TOP), torch.tensor([0, 1, 2, 3])
    shown: list[Tensor] = []

    def watch(self: Draws, logits: Tensor, uniform: Tensor) -> Tensor:
        shown.append(logits)
        return drawn(self, logits, uniform)

    drawn = Draws.codes
    monkeypatch.setattr(Draws, "codes", watch)
    draws = Draws(Sampling(), [1, 2, 3, 4], classes.device)
    known = torch.full((4, GRID.side, GRID.side), -1)
    (grid,) = network.sample([top], classes, draws, [known])
    (full,) = network([top], [grid], classes)
    torch.testing.assert_close(torch.stack(shown, dim=1), full, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_class_and_place_are_told() -> None:
    network, top, grid = make(), codes(1, TOP).expand(2, -1, -1), codes(1, GRID).expand(2, -1, -1)
    (logits,) = network([top], [grid], torch.tensor([0, 1]))
    assert ((logits[0] - logits[1]).abs().amax(1) > 1e-6).all()
    changed = top.clone()
    changed[1, 2, 2] = (changed[1, 2, 2] + 1) % TOP.codes  # the last cell over the grid
    (logits,) = network([changed], [grid], torch.tensor([0, 0]))
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-6


def test_dropout_acts_in_training_alone() -> None:
    network, arguments = make(dropout=0.5), ([codes(1, TOP)], [codes(1, GRID)], torch.tensor([0]))
    assert torch.equal(network(*arguments)[0], network(*arguments)[0])
    network.train()
    assert not torch.equal(network(*arguments)[0], network(*arguments)[0])


def test_it_learns_a_rule() -> None:
    """Each code follows from the one above and the class; the first row is chance, 4 · log 8 nats."""
    torch.manual_seed(0)
    grid, rows = GridShape(4, 8), torch.arange(4)[None, :, None]
    prior = Prior([PixelCNN([grid], 4, layers=2, width=16, kernel=3, dropout=0.0)])
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(100):
        classes, first = torch.randint(4, (64,)), torch.randint(8, (64, 1, 4))
        loss = prior([(first + rows * (classes[:, None, None] + 1)) % 8], classes)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 4 * math.log(8) - 0.3 < loss.item() < 4 * math.log(8) + 2  # of 12 codes that were worth 25 nats
