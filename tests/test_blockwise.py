"""A grid in a few passes: their order, what is seen, that the likelihood is one, and that drawing follows it."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from vqscale.models.blockwise import Blockwise, BlockwiseSteps
from vqscale.models.generate import Draws, Sampling
from vqscale.models.network import GridShape
from vqscale.models.pass_order import Passes, make_passes, pass_sizes, spread_order, spread_parts, wave_parts

TOP = GridShape(1, 3)
SIZES: dict[str, Any] = {
    "layers": 2,
    "width": 16,
    "heads": 2,
    "order": "spread",
    "passes": 4,
    "schedule": "cosine",
    "window": 3,
}
LLAMA: dict[str, Any] = {"positions": "rotary", "feed": "swiglu", "norm": "rms", "key_value_heads": 1, "window": 5}


def make(grid: GridShape, **settings: Any) -> Blockwise:
    torch.manual_seed(0)
    network = Blockwise([grid], 2, [TOP], **(SIZES | settings)).eval()
    for parameter in network.parameters():  # the initial scale is too small to tell positions apart
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def spread(side: int, passes: int) -> Passes:
    return make_passes(side, spread_parts(side, passes, "cosine"), 3)


def test_the_order_goes_from_coarse_to_fine() -> None:
    for side in range(1, 10):
        assert spread_order(side).sort().values.tolist() == list(range(side**2))
    order = spread_order(8)
    for step, count in ((8, 1), (4, 4), (2, 16), (1, 64)):  # a lattice of so many cells, filled before the next
        lattice = {8 * row + column for row in range(0, 8, step) for column in range(0, 8, step)}
        assert set(order[:count].tolist()) == lattice
    first = {8 * row + column for row, column in product(range(8), range(8)) if (row + column) % 2 == 0}
    assert set(order[:32].tolist()) == first  # half of them: the white squares of a chess-board


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_passes_grow_and_draw_all_cells(schedule: str) -> None:
    for length, passes in product((1, 2, 9, 64, 1024, 4096), (1, 2, 3, 8, 16, 50, 64, 100)):
        sizes = pass_sizes(length, passes, schedule)
        assert len(sizes) == min(passes, length)
        assert sum(sizes) == length
        assert min(sizes) >= 1
        assert all(one <= other for one, other in pairwise(sizes))
    assert pass_sizes(64, 8, "cosine") == [2, 3, 6, 8, 10, 11, 12, 12]
    assert pass_sizes(64, 8, "linear") == [8] * 8


@pytest.mark.parametrize(("side", "passes"), [(1, 1), (3, 4), (4, 3), (8, 8), (8, 64), (7, 5)])
def test_every_code_is_carried_into_the_next_pass(side: int, passes: int) -> None:
    passed = spread(side, passes)
    parts = list(zip(passed.order.split(passed.sizes), passed.carried.split(passed.sizes), strict=True))
    assert (parts[0][1] == side**2).all()
    for (before, _), (_, carried) in pairwise(parts):
        assert set(carried.tolist()) == set(before.tolist())


@pytest.mark.parametrize("side", [1, 2, 3, 8, 9])
def test_a_wave_knows_what_lies_to_the_left_and_above(side: int) -> None:
    parts = wave_parts(side)
    assert len(parts) == 3 * side - 2
    assert torch.cat(parts).sort().values.tolist() == list(range(side**2))
    number = {cell: count for count, part in enumerate(parts) for cell in part.tolist()}
    for row, column in product(range(side), repeat=2):
        known = [(row, column - 1), (row - 1, column - 1), (row - 1, column), (row - 1, column + 1)]
        inside = [r * side + c for r, c in known if r >= 0 and 0 <= c < side]
        assert all(number[cell] < number[row * side + column] for cell in inside)
    passed = make_passes(side, parts, 3)
    assert passed.sizes == [len(part) for part in parts]
    carried = passed.carried.split(passed.sizes)
    for one, part, given in zip(parts, parts[1:], carried[1:], strict=False):
        assert set(given.tolist()) <= set(one.tolist())
        assert len(part) < len(one) or set(given.tolist()) == set(one.tolist())


def test_near_cells_are_those_around() -> None:
    passed = spread(3, 9)
    middle = passed.order.tolist().index(4)
    assert passed.near[middle].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    before = set(passed.order[:middle].tolist())
    assert passed.seen[middle].tolist() == [cell in before for cell in (0, 1, 2, 3, 5, 6, 7, 8)]
    corner = passed.order.tolist().index(0)
    assert passed.near[corner].tolist() == [9, 9, 9, 9, 1, 9, 3, 4]
    assert passed.seen[corner][passed.near[corner] == 9].all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("side", "settings"),
    [
        (4, {}),
        (4, LLAMA),
        (3, {"passes": 9}),
        (5, {"schedule": "linear", "window": 7}),
        (8, {"passes": 2}),
        (4, {"order": "wave"}),
    ],
)
def test_codes_of_the_passes_before_are_seen_and_no_others(side: int, settings: dict[str, Any]) -> None:
    network = make(GridShape(side, 4), **settings)
    grid, top, classes = torch.arange(side**2).view(1, side, side) % 4, torch.tensor([[[2]]]), torch.tensor([1])
    number = torch.empty(side**2, dtype=torch.int64)  # of the pass that draws a cell
    for count, cells in enumerate(network.order.split(network.sizes)):
        number[cells] = count
    (before,) = network([top], [grid], classes)
    for cell in range(side**2):
        changed = grid.clone()
        changed.view(-1)[cell] = (changed.view(-1)[cell] + 1) % 4
        differs = (network([top], [changed], classes)[0] - before)[0].abs().amax(1)
        later = number > number[cell]
        assert (differs[~later] == 0).all()
        assert (differs[later] > 1e-6).all()
    for arguments in (([torch.tensor([[[1]]])], [grid], classes), ([top], [grid], torch.tensor([0]))):
        assert ((network(*arguments)[0] - before).abs().amax(2) > 1e-6).all()


def every_grid(codes: int) -> Tensor:
    """All grids of 2×2 cells."""
    return torch.tensor(list(product(range(codes), repeat=4))).view(-1, 2, 2)


@torch.no_grad()
@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_the_probabilities_of_all_grids_add_up_to_one(passes: int) -> None:
    network, grids = make(GridShape(2, 3), passes=passes), every_grid(3)
    top, classes = torch.ones(81, 1, 1, dtype=torch.int64), torch.zeros(81, dtype=torch.int64)
    (nats,) = network.nats([top], [grids], classes, torch.empty(81, 0), 0.0)
    assert network.exact
    assert torch.exp(-nats.double()).sum().item() == pytest.approx(1, abs=1e-5)
    assert nats.std() > 0.1


@torch.no_grad()
def test_grids_are_drawn_as_often_as_their_likelihood_says() -> None:
    """So what is drawn from is what is trained, pass by pass."""
    network, grids, count = make(GridShape(2, 2), passes=3), every_grid(2), 4000
    network.head.weight *= 4
    (nats,) = network.nats(
        [torch.ones(16, 1, 1, dtype=torch.int64)], [grids], torch.zeros(16).long(), torch.empty(16, 0), 0.0
    )
    draws = Draws(Sampling(), range(count), grids.device)
    free = torch.full((count, 2, 2), -1)
    (drawn,) = network.sample(
        [torch.ones(count, 1, 1, dtype=torch.int64)], torch.zeros(count, dtype=torch.int64), draws, [free]
    )
    number = (drawn.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)
    share, expected = number.bincount(minlength=16) / count, torch.exp(-nats)
    assert ((share - expected).abs() < 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()
    assert expected.max() > 2 * expected.median()


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, LLAMA, {"passes": 16}, {"passes": 1}, {"order": "wave"}])
def test_drawing_follows_the_forward(settings: dict[str, Any]) -> None:
    """Pass by pass, with keys and values kept and other kernels; codes of later passes are not looked at."""
    network = make(GridShape(4, 5), **settings)
    top, classes, flat = torch.tensor([[[0]], [[2]]]), torch.tensor([0, 1]), torch.arange(32).view(2, 16) % 5
    (expected,) = network([top], [flat.view(2, 4, 4)], classes)
    assert network.condition is not None
    steps = BlockwiseSteps(network, network.context(classes, network.condition.apart([top])))
    shown = torch.full_like(flat, -1)
    for number, cells in enumerate(network.order.split(network.sizes)):
        torch.testing.assert_close(steps.logits(number, shown), expected[:, cells], atol=1e-4, rtol=1e-4)
        shown[:, cells] = flat[:, cells]
