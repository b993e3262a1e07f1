"""The tokenizer's options through real processes: all ranks stay equal, and their number changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks import RanksFailedError, run_ranks
from tests.recipes import tiny_recipe
from tests.training_helpers import State, clock_run, many_streams, tokenizer_experiment
from vqscale.config.recipe import Recipe
from vqscale.models.losses import adaptive_weight
from vqscale.training import adversary, tasks
from vqscale.training.build import build_tokenizer
from vqscale.training.distributed import process_group
from vqscale.training.tokenizer_task import TokenizerTask

pytestmark = pytest.mark.dist

STEPS = 6


def recipe(**quantizer: Any) -> Recipe:
    """All that lives beside the network: discriminator, averaged weights, windows."""
    training = {"steps": STEPS, "learning_rate": 2e-3, "log_every": 2, "checkpoint_every": 99, "hash_every": 2}
    settings = {f"tokenizer__training__{key}": value for key, value in training.items()}
    return tiny_recipe(
        **many_streams(**settings),
        tokenizer__quantizer={"decay": 0.7, "restart_below": 0.3, "max_restarts": 4, "init": "kmeans"} | quantizer,
        tokenizer__losses={"adversarial": {"start": 2, "width": 4, "layers": 2}},
        tokenizer__ema_decay=0.5,
    )


@dataclass
class Trained:
    """What a training left behind on one rank."""

    network: State
    beside: State
    validation: dict[str, float]
    lines: dict[int, dict[str, float]] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    """The adaptive weight of each step that had one."""


def train(run: Path, settings: Recipe, folder: Path) -> Trained:
    torch.manual_seed(0)
    network = build_tokenizer(settings.tokenizer)  # before there is a process group to look up
    weights: list[float] = []

    def look(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        weights.append(float(weight := adaptive_weight(own, other)))
        return weight

    adversary.adaptive_weight = look  # type: ignore[assignment]
    tasks.build_tokenizer = lambda tokenizer: network  # type: ignore[assignment]
    with process_group("cpu", 60) as ranks:
        made = tokenizer_experiment(ranks, run, settings)
        assert isinstance(made.task, TokenizerTask)
        validation = made.run(folder)
        beside = {name: value.numpy().copy() for name, value in made.task.extra_state().items()}
        beside |= {piece.name.removeprefix("extra/"): piece.local.numpy().copy() for piece in made.task.pieces()}
        return Trained(made.state(), beside, validation, made.recorder.lines, weights)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clock_run(tmp_path_factory.mktemp("ranks") / "run", **many_streams())


@pytest.fixture(scope="module")
def by_world(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Trained]]:
    root = tmp_path_factory.mktemp("trained")
    return {world: run_ranks(world, train, run, recipe(), root / str(world)) for world in (1, 2)}


def assert_equal(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name


def test_discriminators_averages_and_windows_are_equal_on_all_ranks(by_world: dict[int, list[Trained]]) -> None:
    first, second = by_world[2]
    assert_equal(first.beside, second.beside)
    assert_equal(first.network, second.network)
    assert first.weights == second.weights
    kinds = {name.split(".")[0] for name in first.beside}
    assert kinds == {"average", "discriminator", "discriminator_adamw", "window"}


def test_the_number_of_ranks_changes_rounding_alone(by_world: dict[int, list[Trained]]) -> None:
    (alone,), (together, _) = by_world[1], by_world[2]
    assert len(alone.weights) == STEPS - 2
    np.testing.assert_allclose(together.weights, alone.weights, rtol=1e-3)
    assert together.validation == pytest.approx(alone.validation, rel=1e-3)
    assert together.lines.keys() == alone.lines.keys()
    for step, line in alone.lines.items():
        for name, value in line.items():
            if not name.startswith(("speed/", "checkpoint/", "memory/")):
                assert together.lines[step][name] == pytest.approx(value, rel=5e-3, abs=1e-4), (step, name)
    for name, value in alone.beside.items():
        if name.startswith(("discriminator.", "average.")):
            np.testing.assert_allclose(together.beside[name], value, rtol=1e-2, atol=2e-3, err_msg=name)


def test_validation_is_the_same_on_all_ranks(by_world: dict[int, list[Trained]]) -> None:
    """Every rank takes part, and the sums go over all of them."""
    first, second = by_world[2]
    assert first.validation == second.validation


def test_names_are_those_of_the_bare_network(by_world: dict[int, list[Trained]]) -> None:
    names = [*by_world[2][0].network, *by_world[2][0].beside]
    assert not [name for name in names if "module." in name]


def test_codes_that_learn_by_gradients_are_equal_on_all_ranks(run: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, train, run, recipe(learning="gradient", distance="cosine"), tmp_path)
    assert_equal(first.network, second.network)
    assert sum(first.lines[step]["bottom/restarted"] for step in first.lines) > 0


def tamper(run: Path, folder: Path) -> None:
    with process_group("cpu", 60) as ranks:
        made = tokenizer_experiment(ranks, run, recipe())
        assert isinstance(made.task, TokenizerTask)
        after_step, found = made.task.after_step, made.task._adversary
        assert found is not None

        def spoil() -> None:
            after_step()
            if ranks.rank == 1:
                next(found.network.parameters()).data[0] += 1e-6

        made.task.after_step = spoil  # type: ignore[method-assign]
        made.run(folder)


def test_a_discriminator_that_differs_stops_the_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, tamper, run, tmp_path)
    assert len(caught.value.tracebacks) == 2
    for text in caught.value.tracebacks.values():
        assert "step 2: the discriminator on rank 1 differs from rank 0's" in text
