"""Masked prediction: what is seen, the bound, and how the passes fill a grid."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from vqscale.models.generate import Draws, Sampling
from vqscale.models.masked import Masked, MaskedSteps
from vqscale.models.network import GridShape
from vqscale.models.prior import Prior

TOP = GridShape(1, 3)
SIZES: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "dropout": 0.0, "passes": 4, "schedule": "cosine"}


def make(grid: GridShape, **settings: Any) -> Masked:
    torch.manual_seed(0)
    network = Masked([grid], 2, [TOP], **(SIZES | {"choice_temperature": 4.5} | settings)).eval()
    for parameter in network.parameters():  # the initial scale is too small to tell positions apart
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"positions": "rotary", "feed": "swiglu", "norm": "rms", "key_value_heads": 1}]
)
def test_a_masked_code_is_not_seen_and_all_others_are(options: dict[str, Any]) -> None:
    network, grid = make(GridShape(3, 4), **options), torch.arange(9).view(1, 3, 3) % 4
    top, classes = torch.tensor([[[2]]]), torch.tensor([1])
    shown: list[Tensor] = []
    network.blocks[0].register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    chance = torch.tensor([[0.5, 0.9, 0.1, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5]])  # masks five: cells 1, 2, 4, 6, 8
    network.nats([top], [grid], classes, chance, 0.0)
    other = grid.clone().view(1, 9)
    other[0, [1, 2, 4, 6, 8]] += 1
    network.nats([top], [other.view(1, 3, 3) % 4], classes, chance, 0.0)
    assert torch.equal(shown[0], shown[1])
    (before,) = network([top], [grid], classes)
    for cell in range(9):
        changed = grid.clone()
        changed.view(-1)[cell] = -1
        assert ((network([top], [changed], classes)[0] - before).abs().amax(2) > 1e-6).all()
    for arguments in (([torch.tensor([[[1]]])], [grid], classes), ([top], [grid], torch.tensor([0]))):
        assert ((network(*arguments)[0] - before).abs().amax(2) > 1e-6).all()


@torch.no_grad()
def test_the_estimate_is_on_average_that_of_a_random_order() -> None:
    """All 24 orders of a grid of four codes, worked out one by one, against the mean of many estimates."""
    network = make(GridShape(2, 3))
    top, classes, grid = torch.tensor([[[1]]]), torch.tensor([0]), torch.tensor([[[0, 2], [1, 0]]])
    flat, total = grid.view(-1), 0.0
    for order in itertools.permutations(range(4)):
        shown = torch.full((1, 4), -1)
        for cell in order:
            (logits,) = network([top], [shown.view(1, 2, 2)], classes)
            total -= float(torch.log_softmax(logits[0, cell], 0)[flat[cell]]) / 24
            shown[0, cell] = flat[cell]
    count = 4000
    chance = torch.rand(count, network.chances, generator=torch.Generator().manual_seed(1))
    (found,) = network.nats(
        [top.expand(count, -1, -1)], [grid.expand(count, -1, -1)], classes.expand(count), chance, 0.0
    )
    assert abs(found.mean().item() - total) < 4 * found.std().item() / count**0.5
    assert not network.exact
    assert not Prior([network]).exact


@torch.no_grad()
def test_the_figures_of_held_out_codes_depend_on_nothing_but_them() -> None:
    network = Masked([GridShape(4, 5)], 2, **SIZES, choice_temperature=4.5).eval()
    prior, generator = Prior([network]), torch.Generator().manual_seed(0)
    grids, classes = torch.randint(5, (6, 4, 4), generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    (together,) = prior([grids], classes)
    for one in range(6):
        (alone,) = prior([grids[one : one + 1]], classes[one : one + 1])
        assert alone.item() == pytest.approx(together[one].item(), rel=1e-5)


@pytest.mark.parametrize(("schedule", "passes"), [("cosine", 4), ("linear", 4), ("cosine", 1), ("cosine", 40)])
@torch.no_grad()
def test_passes_fill_the_grid_by_the_schedule(schedule: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, masked = make(GridShape(4, 5), schedule=schedule, passes=passes), []
    logits = MaskedSteps.logits

    def watch(self: MaskedSteps, flat: Tensor) -> Tensor:
        masked.append((flat < 0).sum(1).tolist())
        return logits(self, flat)

    monkeypatch.setattr(MaskedSteps, "logits", watch)
    known = torch.full((2, 4, 4), -1)
    known[1, :2] = 3
    draws = Draws(Sampling(), [1, 2], known.device)
    (grid,) = network.sample([torch.tensor([[[0]], [[1]]])], torch.tensor([0, 1]), draws, [known])
    assert (grid >= 0).all()
    assert (grid[1, :2] == 3).all()
    first = [row[0] for row in masked]
    expected = {
        ("cosine", 4): [16, 14, 11, 6],
        ("linear", 4): [16, 12, 8, 4],
        ("cosine", 1): [16],
    }
    if passes < 16:
        assert first == expected[schedule, passes]
    else:  # one in each pass at least; the last passes have nothing left to do
        assert all(after < before or not before for before, after in itertools.pairwise(first))


@torch.no_grad()
def test_the_surest_codes_are_kept_first_unless_there_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """With logits that are surer from cell to cell, and no noise, the last half is kept in the first pass."""
    network = make(GridShape(2, 3), passes=2, schedule="linear", choice_temperature=0.0)
    sure = torch.zeros(1, 4, 3)
    sure[0, :, 1] = torch.tensor([10.0, 20.0, 30.0, 40.0])
    seen: list[Tensor] = []

    def shown(self: MaskedSteps, flat: Tensor) -> Tensor:
        seen.append(flat)
        return sure.expand(len(flat), -1, -1)

    monkeypatch.setattr(MaskedSteps, "logits", shown)
    arguments = ([torch.tensor([[[0]]])], torch.tensor([0]))
    known = [torch.full((1, 2, 2), -1)]
    for seed in range(20):
        network.sample(*arguments, Draws(Sampling(), [seed], known[0].device), known)
        assert seen[-1].tolist() == [[-1, -1, 1, 1]]
    network.choice_temperature = 1000.0
    for seed in range(20):
        network.sample(*arguments, Draws(Sampling(), [seed], known[0].device), known)
    assert len({tuple(grid[0].tolist()) for grid in seen[-39::2]}) > 3


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@torch.no_grad()
def test_drawing_follows_the_forward(positions: str) -> None:
    """What codes are drawn from are the logits of the forward, with other kernels."""
    network = make(GridShape(4, 5), positions=positions)
    top, classes, flat = torch.tensor([[[0]], [[2]]]), torch.tensor([0, 1]), torch.arange(32).view(2, 16) % 6 - 1
    (expected,) = network([top], [flat.view(2, 4, 4)], classes)
    assert network.condition is not None
    steps = MaskedSteps(network, network._context(classes, network.condition.apart([top])))
    torch.testing.assert_close(steps.logits(flat), expected, atol=1e-4, rtol=1e-4)
