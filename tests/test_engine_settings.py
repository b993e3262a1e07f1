"""Settings of the engine: what is refused before anything starts, and steps that are skipped; one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

from tests.recipes import tiny_recipe
from tests.training_helpers import Experiment, clock_run, code_shards, one_process, prior_experiment, tf32_allowed
from vqscale.config.training import Training
from vqscale.data.loader import Batch
from vqscale.errors import UserError
from vqscale.models.convnets import Stack
from vqscale.models.quantizer import Donors
from vqscale.training.distributed import Ranks
from vqscale.training.engine import _equip
from vqscale.training.transfer import DeviceBatch, _on

T = "prior__training__"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clock_run(tmp_path_factory.mktemp("settings") / "run")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings-codes")
    code_shards(folder, shards=4)
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with one_process(monkeypatch) as ranks:
        yield ranks


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({f"{T}micro_batch": 3}, r"prior.training.micro_batch 3 does not divide the 8 samples of a rank .*1, 2, 4, 8"),
        (
            {f"{T}micro_batch": 8, "resources__processes": 2},
            r"micro_batch 8 does not divide the 4 samples of a rank .*use one of 1, 2, 4",
        ),
        ({f"{T}optimizer": "muon", "resources__strategy": "zero1"}, r"prior.training.optimizer muon .*zero1 cuts; use"),
        ({f"{T}compile": True, "resources__strategy": "zero3"}, r"prior.training.compile .*zero3.*use fsdp2"),
    ],
)
def test_what_cannot_run_is_refused_by_the_recipe(overrides: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        tiny_recipe(**overrides)


def test_a_micro_batch_is_checked_against_the_ranks_that_there_are() -> None:
    batch = DeviceBatch(0, {"label": torch.arange(8)}, torch.arange(8))
    assert [part.index.tolist() for part in batch.split(4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.split(None) == [batch]
    with pytest.raises(UserError, match=r"training\.micro_batch: 3 does not divide the 8 samples of a rank"):
        batch.split(3)


class Many(nn.Module):
    """Units that all are shaped otherwise, as the stacks of four levels are."""

    units = (Stack,)

    def __init__(self) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(Stack(nn.Linear(2, 3 + place)) for place in range(12))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [stack(x) for stack in self.stacks]


def test_all_units_are_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, model, x = CompileCounter(), Many(), torch.ones(1, 2)
    expected = model(x)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        _equip(model, Training(steps=1, global_batch=1, learning_rate=1.0, compile=True))
        assert all(map(torch.equal, model(x), expected))
        assert counter.frame_count == len(model.stacks)
        torch._dynamo.config.recompile_limit = 1
        with pytest.raises(FailOnRecompileLimitHit):
            model(torch.ones(1, 2, dtype=torch.float64).requires_grad_().float())
    torch._dynamo.reset()


def test_fp32_is_exact_on_gpus_where_a_stage_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    with tf32_allowed() as allowed:
        assert allowed()
        with one_process(monkeypatch):
            assert not allowed()


def test_places_in_the_global_batch_stay_on_the_cpu() -> None:
    """Their copy would be one from pageable memory, which waits for all before it; donors are found without them."""
    device = torch.device("meta")
    batch = _on(Batch(0, {"label": np.arange(8)}, np.arange(8)), device)
    assert batch.fields["label"].device == device
    assert batch.index.tolist() == list(range(8))
    drawn = Donors(batch.index, 8, 0).draw(torch.empty(8, 4, 3, device=device), 0, 5)
    assert (drawn.device, drawn.shape) == (device, (5, 3))


def test_zero_without_deepspeed_is_one_clear_line(alone: Ranks, codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else found(name, *a))
    with pytest.raises(UserError, match=r"^resources.strategy: zero2 needs DeepSpeed.*install -c .* '\.\[deepspeed"):
        prior_experiment(alone, codes, tiny_recipe(resources__strategy="zero2"))


def spoil(made: Experiment, bad: Callable[[int], bool]) -> None:
    """An infinite gradient in the steps that are `bad`."""
    losses = made.task.losses

    def spoiled(batch: DeviceBatch) -> dict[str, torch.Tensor]:
        found = losses(batch)
        return found | {"total": found["total"] * torch.inf} if bad(batch.step) else found

    made.task.losses = spoiled  # type: ignore[method-assign]


def test_skipped_steps_are_counted_and_borne(alone: Ranks, codes: Path, tmp_path: Path) -> None:
    made = prior_experiment(alone, codes, tiny_recipe(**{f"{T}max_skipped": 2}))
    steps: list[int] = []
    made.task.after_step = lambda: steps.append(len(steps))  # type: ignore[method-assign]
    spoil(made, lambda step: step in (0, 2, 3, 5))
    made.run(tmp_path)
    assert made.recorder.curve("optim/skipped") == [1, 1, 2, 3, 3, 4, 4, 4]
    assert len(steps) == 4
    assert "loss/total" not in made.recorder.lines[1]  # there is none yet
    assert made.recorder.lines[4]["loss/total"] == made.recorder.lines[2]["loss/total"]
    # The checkpoint due at step 4 waits for a step that is taken.
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000005", "step-00000008"]


@pytest.mark.parametrize(("bad", "at"), [(range(2, 8), 5), (range(7, 8), 8)])
def test_a_run_that_only_skips_stops(alone: Ranks, codes: Path, tmp_path: Path, bad: range, at: int) -> None:
    """And so does one whose last step was skipped."""
    made = prior_experiment(alone, codes, tiny_recipe(**{f"{T}max_skipped": 2}))
    spoil(made, lambda step: step in bad)
    with pytest.raises(FloatingPointError, match=f"step {at}: the last . steps were skipped"):
        made.run(tmp_path)
