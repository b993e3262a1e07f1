"""Training through real processes: nothing may depend on the number of ranks, or on being interrupted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.stage import run_stage
from tests.ranks import RanksFailedError, run_ranks
from tests.recipes import tiny_recipe
from tests.training_helpers import (
    State,
    clock_run,
    many_streams,
    one_process,
    tokenizer_experiment,
)
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError
from vqscale.files import read_json
from vqscale.models.pixels import from_uint8
from vqscale.models.quantizer import Donors, update_codebooks
from vqscale.models.vqvae import VQVAE
from vqscale.seeds import mix
from vqscale.training import strategies
from vqscale.training.build import build_tokenizer
from vqscale.training.checkpoints.reader import load_network, require
from vqscale.training.distributed import process_group
from vqscale.training.guards import CodebookMismatchError

pytestmark = pytest.mark.dist

STEPS, HALF = 20, 8
WORLDS = (1, 2, 3)


def tokenizer_recipe(**overrides: Any) -> Recipe:
    """Codes fall dead and are restarted within a few steps."""
    quantizer = {"decay": 0.7, "restart_below": 0.3, "max_restarts": 4}
    training = {"steps": STEPS, "learning_rate": 2e-3, "warmup": 4, "checkpoint_every": HALF, "keep": 9}
    settings = {f"tokenizer__training__{key}": value for key, value in training.items()}
    return tiny_recipe(**many_streams(**settings, tokenizer__quantizer=quantizer, **overrides))


@dataclass
class Training:
    """What a training left behind on one rank."""

    curves: dict[str, list[float]] = field(default_factory=dict)
    """On rank 0."""
    state: State = field(default_factory=dict)
    first_codes: list[np.ndarray] = field(default_factory=list)
    """The codebooks after the data-dependent init, finest level first."""
    gradients: State = field(default_factory=dict)
    """Of the first step."""
    validation: dict[str, float] = field(default_factory=dict)


CURVES = ("loss/total", "loss/reconstruction", "loss/commitment_bottom", "loss/commitment_top", "bottom/restarted",
          "top/restarted", "bottom/perplexity", "optim/gradient_norm", "optim/learning_rate")  # fmt: skip


def train_tokenizer(run: Path, recipe: Recipe, folder: Path, weights: int = 0) -> Training:
    """Train over this process's ranks; goes on from what `folder` holds."""
    with process_group("cpu", 60) as ranks:
        made, found = tokenizer_experiment(ranks, run, recipe, weights), Training()
        before_step, adamw = made.task.before_step, made.engine._strategy.optimizers["adamw"]
        step = adamw.step

        def prepare_and_look(batch: Any) -> None:
            before_step(batch)
            if batch.step == 0:
                found.first_codes = [book.codes.numpy().copy() for book in made.engine.bare.codebooks]

        def step_and_look() -> None:
            if not found.gradients:
                named = made.engine.bare.named_parameters()
                found.gradients = {name: value.grad.numpy().copy() for name, value in named}
            step()

        made.task.before_step = prepare_and_look  # type: ignore[method-assign]
        adamw.step = step_and_look
        found.validation = made.run(folder)
        found.state = made.state()
        if ranks.first:
            found.curves = {name: made.recorder.curve(name) for name in CURVES}
        return found


@dataclass
class Trained:
    """Undisturbed trainings by number of ranks."""

    root: Path
    run: Path
    ranks: dict[int, list[Training]]

    def checkpoints(self, world: int) -> Path:
        return self.root / f"world-{world}"

    def interrupted(self, world: int, name: str) -> Path:
        """Checkpoints as they stood when a training over `world` ranks was stopped half-way."""
        folder = self.root / name
        shutil.copytree(self.checkpoints(world) / f"step-{HALF:08d}", folder / f"step-{HALF:08d}")
        return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("tokenizers")
    run = clock_run(root / "run", **many_streams())
    recipe = tokenizer_recipe()
    return Trained(root, run, {n: run_ranks(n, train_tokenizer, run, recipe, root / f"world-{n}") for n in WORLDS})


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def assert_close(one: State, other: State, rtol: float, atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol, atol, err_msg=name)


def test_the_training_is_worth_comparing(tokenizers: Trained) -> None:
    curves = tokenizers.ranks[1][0].curves
    assert len(curves["loss/total"]) == STEPS
    assert curves["loss/reconstruction"][-1] < 0.9 * curves["loss/reconstruction"][0]
    assert sum(curves["bottom/restarted"]) > 5
    assert sum(curves["top/restarted"]) > 5


@pytest.mark.parametrize("world", WORLDS[1:])
def test_loss_curves_agree(tokenizers: Trained, world: int) -> None:
    alone, together = tokenizers.ranks[1][0], tokenizers.ranks[world][0]
    for name in CURVES:
        np.testing.assert_allclose(together.curves[name], alone.curves[name], rtol=2e-4, err_msg=name)
    assert together.validation == pytest.approx(alone.validation, rel=1e-4)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_ranks_are_bit_identical(tokenizers: Trained, world: int) -> None:
    first, *others = tokenizers.ranks[world]
    for other in others:
        assert equal(first.state, other.state)
        assert all(np.array_equal(a, b) for a, b in zip(first.first_codes, other.first_codes, strict=True))


@pytest.mark.parametrize("world", WORLDS[1:])
def test_first_codes_do_not_depend_on_the_ranks(tokenizers: Trained, world: int) -> None:
    alone, together = tokenizers.ranks[1][0].first_codes, tokenizers.ranks[world][0].first_codes
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        assert len(np.unique(one, axis=0)) == len(one)


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_equal_a_plain_loop(tokenizers: Trained, world: int) -> None:
    """No engine, no DDP, no ranks: one backward of the whole batch."""
    expected = plain_loop(tokenizers.run, tokenizer_recipe(), steps=1)[0]
    got = tokenizers.ranks[world][0].gradients
    assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_weights_equal_a_plain_loop(tokenizers: Trained) -> None:
    expected = plain_loop(tokenizers.run, tokenizer_recipe(), steps=STEPS)[1]
    for name, value in expected.items():
        # By norm: where a gradient is nearly nought, AdamW makes a whole step of the sign that rounding gives it.
        off = np.linalg.norm(tokenizers.ranks[1][0].state[name] - value) / np.linalg.norm(value)
        assert off < 2e-2, f"{name} is off by {off:.1e}; eight steps of another optimizer would be off by about 1e-1"


def plain_loop(run: Path, recipe: Recipe, steps: int) -> tuple[State, State]:
    """Gradients of the first step and the last weights, written down without any of the training room."""
    from tests.training_helpers import Experiment, OneRank
    from vqscale.data.image_source import ImageSource
    from vqscale.data.manifest import read_manifest
    from vqscale.data.shards import open_shards

    training = recipe.tokenizer.training
    url = RunLayout(run).shards(recipe, "train")
    manifest = read_manifest(url)
    fake: Any = type("Task", (), {"engine": type("Engine", (), {"training": training})})()
    made = Experiment(OneRank(), recipe, fake, ImageSource(open_shards(url), 16), manifest.counts)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model: VQVAE = build_tokenizer(recipe.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=training.betas, weight_decay=0.0)
    first: State = {}
    beta, share = [0.25, 0.25], recipe.tokenizer.quantizer.relief_below
    with made.loader() as loader:
        for step, batch in zip(range(steps), loader, strict=False):
            images = from_uint8(batch.fields["image"], torch.device("cpu"))
            donors = Donors(torch.from_numpy(batch.index), training.global_batch, mix(recipe.seed, step))
            if not step:
                model.initialise_codebooks(images, donors, lambda tensor: tensor)
            output = model(images, donors)
            pulls = [weight * level.commitment for weight, level in zip(beta, output.levels, strict=True)]
            loss = F.mse_loss(output.images, images) + sum(pulls)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            first = first or {name: value.grad.numpy().copy() for name, value in model.named_parameters()}
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 4)
            optimizer.step()
            statistics = [level.statistics for level in output.levels]
            figures = update_codebooks(list(model.codebooks), statistics, lambda tensor: tensor, step)  # type: ignore[arg-type]
            usable = [min(16.0, float(level.counts.sum())) for level in figures]
            used = [float(level.perplexity) / codes for level, codes in zip(figures, usable, strict=True)]
            beta = [0.25 * min(1.0, part / share) for part in used]
    return first, {name: value.numpy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("world", [1, 2])
def test_stopped_and_resumed_is_bit_identical(tokenizers: Trained, world: int) -> None:
    folder = tokenizers.interrupted(world, f"resumed-{world}")
    resumed = run_ranks(world, train_tokenizer, tokenizers.run, tokenizer_recipe(), folder, 99)[0]
    undisturbed = tokenizers.ranks[world][0]
    assert len(resumed.curves["loss/total"]) == STEPS - HALF
    assert resumed.curves["loss/total"] == undisturbed.curves["loss/total"][HALF:]
    assert equal(resumed.state, undisturbed.state)
    last = f"step-{STEPS:08d}/manifest.json"
    assert read_json(folder / last) == read_json(tokenizers.checkpoints(world) / last)


def test_resumed_at_another_number_of_ranks(tokenizers: Trained) -> None:
    folder = tokenizers.interrupted(1, "resumed-1-by-2")
    first, second = run_ranks(2, train_tokenizer, tokenizers.run, tokenizer_recipe(), folder, 99)
    assert equal(first.state, second.state)
    expected = tokenizers.ranks[1][0].curves["loss/total"][HALF:]
    np.testing.assert_allclose(first.curves["loss/total"], expected, rtol=2e-4)
    assert_close(first.state, tokenizers.ranks[1][0].state, rtol=1e-2, atol=2e-3)


def test_a_checkpoint_of_two_ranks_is_that_of_the_bare_network(tokenizers: Trained) -> None:
    """Loaded strictly, without a process group."""
    network = build_tokenizer(tokenizer_recipe().tokenizer)
    load_network(network, require(tokenizers.checkpoints(2), "tokenizer"))
    for name, value in network.state_dict().items():
        assert np.array_equal(value.numpy(), tokenizers.ranks[2][0].state[name]), name


def test_nothing_left_to_train_still_reports(tokenizers: Trained) -> None:
    """Killed between the last checkpoint and the marker."""
    folder = tokenizers.checkpoints(1)
    again = run_ranks(1, train_tokenizer, tokenizers.run, tokenizer_recipe(), folder, 99)[0]
    assert again.curves["loss/total"] == []
    assert again.validation == tokenizers.ranks[1][0].validation


def tamper(run: Path, recipe: Recipe, folder: Path) -> None:
    with process_group("cpu", 60) as ranks:
        made = tokenizer_experiment(ranks, run, recipe)
        after_step, steps = made.task.after_step, 0

        def spoil() -> None:
            nonlocal steps
            after_step()
            steps += 1
            if ranks.rank == 1 and steps == 3:
                made.engine.bare.codebooks[1].sums[2, 3] += 1e-6

        made.task.after_step = spoil  # type: ignore[method-assign]
        made.run(folder)


def test_a_rank_that_differs_stops_the_run(tokenizers: Trained, tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, tamper, tokenizers.run, tokenizer_recipe(), tmp_path)
    assert len(caught.value.tracebacks) == 2
    for text in caught.value.tracebacks.values():
        assert CodebookMismatchError.__name__ in text
        assert "step 4: the codebook of level 'top' on rank 1 differs from rank 0's" in text


def fail_on_rank_1(stage: Any) -> dict[str, Any]:
    if stage.ranks.rank == 1:
        raise UserError("is unreadable", where="shard-00007.tar", mend="copy it again")
    stage.ranks.barrier()
    return {}


def run_failing_stage(run: Path) -> None:
    import sys

    sys.argv = ["stage", "--run-dir", str(run)]
    run_stage("tokenizer", fail_on_rank_1)


def test_the_rank_that_failed_says_why(tokenizers: Trained) -> None:
    with pytest.raises(RanksFailedError):
        run_ranks(2, run_failing_stage, tokenizers.run)
    failure = read_json(RunLayout(tokenizers.run).failure("tokenizer"))
    expected = {"stage": "tokenizer", "kind": "user", "rank": 1}
    assert failure.items() >= {**expected, "message": "shard-00007.tar: is unreadable; copy it again"}.items()


@pytest.mark.parametrize("missing", [["MASTER_ADDR"], ["RANK", "WORLD_SIZE"]])
def test_an_incomplete_environment_is_an_error(missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It never falls back to one process or to localhost."""
    whole = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for name in whole.keys() - set(missing):
        monkeypatch.setenv(name, whole[name])
    with pytest.raises(UserError, match=f"lacks {', '.join(missing)};.*torchrun"), process_group("cpu", 5):
        pass
    assert not torch.distributed.is_initialized()


def test_another_kind_than_asked_is_refused(tokenizers: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(strategies._KIND, "cpu", strategies.DistributedType.MULTI_GPU)
    expected = "asked for ddp .*MULTI_GPU.* Accelerate gave .*MULTI_CPU"
    with one_process(monkeypatch) as ranks, pytest.raises(RuntimeError, match=expected):
        tokenizer_experiment(ranks, tokenizers.run, tokenizer_recipe())
