"""A transformer with every option trains alike however its blocks are spread, recomputed or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.recipes import tiny_recipe
from tests.training_helpers import one_process
from vqscale.models.network import GridShape
from vqscale.training.build import build_prior
from vqscale.training.engine import Engine
from vqscale.training.prior_task import PriorTask
from vqscale.training.steps import Steps
from vqscale.training.transfer import DeviceBatch

OPTIONS = {"heads": 4, "key_value_heads": 2, "norm": "rms", "feed": "swiglu", "positions": "rotary"}
GRIDS = (GridShape(2, 16), GridShape(4, 16))


def losses(monkeypatch: pytest.MonkeyPatch, strategy: str = "ddp", **training: Any) -> list[float]:
    """Of three steps on the same codes, and of those held out."""
    changed = {f"prior__training__{key}": value for key, value in training.items()}
    recipe = tiny_recipe(prior__networks=[{"layers": 2, "width": 16, **OPTIONS}], **changed)
    generator = torch.Generator().manual_seed(0)
    fields = {
        name: torch.randint(16, (8, grid.side, grid.side), generator=generator)
        for name, grid in zip(("top", "bottom"), GRIDS, strict=True)
    }
    fields["label"] = torch.arange(8) % 3
    with one_process(monkeypatch) as ranks:
        torch.manual_seed(0)
        engine = Engine(build_prior(recipe.prior, GRIDS, 3), recipe.prior.training, ranks, strategy)
        task = PriorTask(engine, recipe.prior, ["top", "bottom"], 0, lambda: [fields])
        steps, seen = Steps(task), []
        for number in range(3):
            steps.take(DeviceBatch(number, fields, torch.arange(8)))
            seen.append(float(steps.losses["total"]))
        return [*seen, task.validate()["nats_per_code"]]


@pytest.mark.parametrize(
    ("strategy", "training"),
    [("fsdp2", {}), ("ddp", {"checkpoint_activations": True}), ("ddp", {"micro_batch": 2})],
)
def test_options_train_alike_under(strategy: str, training: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = (
        losses(monkeypatch, learning_rate=0.03),
        losses(monkeypatch, strategy, learning_rate=0.03, **training),
    )
    assert other == pytest.approx(plain, rel=1e-4)
    assert plain[3] < plain[0] - 0.1


@pytest.mark.slow
def test_options_train_alike_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert losses(monkeypatch, compile=True) == pytest.approx(losses(monkeypatch), rel=1e-4)
