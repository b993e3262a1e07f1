"""One loop under every strategy, over real ranks: the same training, the same state, the same codebooks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine_runs import HALF, STEPS, STRATEGIES, Trained, disturb, move, prior_recipe, survey, walk
from tests.ranks import run_ranks
from tests.training_helpers import (
    clock_run,
    code_shards,
    forget_accelerate,
    many_streams,
    one_process,
    prior_experiment,
)
from vqscale.training import strategies

# The first test waits for the trainings of all of them, under load too.
pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

SPREAD = STRATEGIES[1:]
OPTIONS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "plain": {},
        "bf16": {"precision": "bf16"},
        "accumulated": {"micro_batch": 3, "steps": 1},
        "at once": {"steps": 1},
        "recomputed": {"checkpoint_activations": True},
    },
    3: {"plain": {}, "bf16": {"precision": "bf16"}, "recomputed": {"checkpoint_activations": True}},
}


@dataclass
class Surveys:
    run: Path
    states: Path
    """Full states half-way, trained by two ranks."""
    ranks: dict[int, list[dict[str, Any]]]
    """What each rank of 2 and of 3 found."""

    def of(self, world: int, strategy: str, option: str) -> Trained:
        found: Trained = self.ranks[world][0][f"{strategy}/{option}"]
        return found


@pytest.fixture(scope="module")
def surveys(tmp_path_factory: pytest.TempPathFactory) -> Surveys:
    root = tmp_path_factory.mktemp("engine")
    run = clock_run(root / "run", **many_streams())
    code_shards(root / "codes")
    (root / "states").mkdir()
    found = {
        world: run_ranks(
            world, survey, run, root / "codes", root / "states" if world == 2 else None, options, timeout=560
        )
        for world, options in OPTIONS.items()
    }
    return Surveys(run, root / "states", found)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("precision", ["plain", "bf16"])
def test_codebooks_are_fp32_restarted_and_bit_identical_on_all_ranks(
    surveys: Surveys, world: int, precision: str
) -> None:
    for strategy in STRATEGIES:
        first, *others = (found[f"{strategy}/{precision}"] for found in surveys.ranks[world])
        assert first.restarts > 3, strategy
        for name, value in first.codebooks.items():
            assert value.dtype == torch.float32
            assert all(torch.equal(value, other.codebooks[name]) for other in others), (strategy, name)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("strategy", SPREAD)
def test_every_strategy_trains_as_ddp_does(surveys: Surveys, world: int, strategy: str) -> None:
    """Sums in another order: about 1e-7 in fp32. In bf16 that can turn a rounding around, 2^-8, in single activations.

    A latent that changes its code by it moves the loss by about 1 / 480, since so many of them make up a batch.
    """
    for precision, rtol in (("plain", 1e-4), ("bf16", 2e-2)):
        alone, spread = surveys.of(world, "ddp", precision), surveys.of(world, strategy, precision)
        assert len(spread.losses) == STEPS
        np.testing.assert_allclose(spread.losses, alone.losses, rtol=rtol)
        assert spread.validation == pytest.approx(alone.validation, rel=10 * rtol)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("strategy", SPREAD)
def test_the_prior_trains_as_under_ddp(surveys: Surveys, world: int, strategy: str) -> None:
    """Nothing jumps in it, so that only sums in another order remain."""
    alone, spread = surveys.of(world, "ddp", "prior"), surveys.of(world, strategy, "prior")
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-4)
    assert spread.validation == pytest.approx(alone.validation, rel=1e-3)
    assert alone.losses[-1] < alone.losses[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_micro_batches_are_one_batch(surveys: Surveys, strategy: str) -> None:
    """Four times three samples a rank: the same assignments and donors, the same gradient but for rounding."""
    whole, parts = surveys.of(2, strategy, "at once"), surveys.of(2, strategy, "accumulated")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for one, other in zip(parts.counts, whole.counts, strict=True):
        assert torch.equal(one, other)
    for name, value in whole.codebooks.items():
        torch.testing.assert_close(parts.codebooks[name], value, rtol=1e-4, atol=1e-5)
    # Adam's first step is the learning rate, 2e-3, in the gradient's direction: where that is nothing, it may turn.
    for name, value in whole.weights.items():
        apart = (parts.weights[name] - value).abs()
        assert apart.max() <= 4.1e-3, name
        assert (apart > 1e-4).float().mean() < 0.02, name


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recomputed_activations_change_nothing(surveys: Surveys, world: int, strategy: str) -> None:
    """The same operations on the same numbers; a codebook updated in its forward would be updated twice."""
    kept, recomputed = surveys.of(world, strategy, "plain"), surveys.of(world, strategy, "recomputed")
    np.testing.assert_allclose(recomputed.losses, kept.losses, rtol=1e-5)
    assert recomputed.restarts == kept.restarts


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skipped_step_and_evaluation_change_nothing(surveys: Surveys, world: int, strategy: str) -> None:
    for rank, found in enumerate(surveys.ranks[world]):
        assert found[f"{strategy}/skipped"] == dict.fromkeys(found[f"{strategy}/skipped"], True), rank


def test_the_state_has_the_same_names_shapes_and_dtypes_everywhere(surveys: Surveys) -> None:
    for option in ("plain", "prior"):
        expected = surveys.of(2, "ddp", option).inventory
        for world in surveys.ranks:
            for strategy in STRATEGIES:
                assert surveys.of(world, strategy, option).inventory == expected, (world, strategy)
    names = surveys.of(2, "ddp", "plain").inventory
    for name in (
        "model/encoders.0.0.weight",
        "model/codebooks.0.sums",
        "optimizer/adamw/exp_avg_sq/encoders.0.0.weight",
        "optimizer/adamw/step/encoders.0.0.weight",
        "extra/average.encoders.0.0.weight",
    ):
        assert name in names
    assert names["optimizer/adamw/step/encoders.0.0.weight"] == ((), "torch.float32")
    assert {dtype for _, dtype in names.values()} == {"torch.float32"}


@pytest.mark.parametrize("world", [1, 3])
def test_state_moves_between_strategies_and_numbers_of_ranks(surveys: Surveys, world: int) -> None:
    """All of it arrives bit by bit, and what is trained on it goes on as the undisturbed training did."""
    for found in run_ranks(world, move, surveys.run, surveys.states, timeout=400):
        for strategy in STRATEGIES:
            assert all(found[f"{other} to {strategy}"] for other in STRATEGIES), strategy
            expected = surveys.of(2, "ddp", "plain").losses[HALF:]
            np.testing.assert_allclose(found[strategy], expected, rtol=1e-3, err_msg=strategy)


@pytest.mark.fault
def test_a_sharded_run_resumes_under_another_strategy_and_a_tampered_codebook_stops_it(
    surveys: Surveys, tmp_path: Path
) -> None:
    expected = "CodebookMismatchError: step 2: the codebook of level 'top' on rank 1 differs from rank 0's"
    found = run_ranks(2, disturb, surveys.run, tmp_path)
    assert all(said.startswith(expected) for _, _, said in found)
    whole, resumed, _ = found[0]
    assert (len(whole), len(resumed)) == (STEPS, STEPS - HALF)
    np.testing.assert_allclose(resumed, whole[HALF:], rtol=1e-3)


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_what_accelerate_makes_of_it_in_silence_is_refused(
    surveys: Surveys, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = strategies.Accelerator

    def silent(**options: Any) -> Any:
        """As `Accelerator(cpu=True)` with a plugin: DDP."""
        forget_accelerate()
        return made(cpu=True)

    for module in ("strategies", "zero"):
        monkeypatch.setattr(f"vqscale.training.{module}.Accelerator", silent)
    with (
        one_process(monkeypatch) as ranks,
        pytest.raises(RuntimeError, match=f"asked for {strategy} .* Accelerate gave .*MULTI_CPU"),
    ):
        prior_experiment(ranks, surveys.run.parent / "codes", prior_recipe(strategy))


def test_compiled_blocks_train_as_eager_ones(surveys: Surveys, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_process(monkeypatch) as ranks:
        losses = []
        for options in ({}, {"compile": True}):
            made = prior_experiment(ranks, surveys.run.parent / "codes", prior_recipe("ddp", **options))
            losses.append(walk(made, made.batches(3)))
            made.task.validate()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
