"""Every setting of a training acts, evaluation changes nothing, and what goes wrong stops the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import test_flows, test_priors, test_vae
from tests.recipes import tiny_recipe
from tests.training_helpers import (
    Experiment,
    Recorder,
    State,
    clock_run,
    code_shards,
    one_process,
    prior_experiment,
    tokenizer_experiment,
)
from vqscale.checkpoint.folder import open_stored
from vqscale.config.training import Training
from vqscale.models.quantizer import Codebook
from vqscale.training import loop
from vqscale.training.build import build_tokenizer
from vqscale.training.checkpoints.reader import Checkpoint, newest
from vqscale.training.distributed import Ranks
from vqscale.training.optimizers import learning_rate, make_optimizers

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clock_run(tmp_path_factory.mktemp("settings") / "run")


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "codes"
    code_shards(folder, shards=4)
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with one_process(monkeypatch) as ranks:
        yield ranks


def tokenizer(ranks: Ranks, run: Path, **overrides: Any) -> Experiment:
    """Settings under which all of them have something to do within a few steps."""
    training = {"steps": STEPS, "warmup": 1, "clip": 0.05, "learning_rate": 1e-2}
    quantizer = {"decay": 0.5, "restart_below": 0.5, "max_restarts": 3}
    settings = {f"tokenizer__training__{key}": value for key, value in training.items()}
    base = {**settings, "tokenizer__quantizer": quantizer}
    for key, value in overrides.items():
        if key.startswith("tokenizer__quantizer__"):
            quantizer[key.removeprefix("tokenizer__quantizer__")] = value
        else:
            base[key] = value
    return tokenizer_experiment(ranks, run, tiny_recipe(**base))


def differs(one: State, other: State) -> bool:
    return any(not np.array_equal(one[name], other[name]) for name in one)


_plain: dict[str, tuple[State, Recorder]] = {}


def plain(ranks: Ranks, run: Path, folder: Path) -> tuple[State, Recorder]:
    """The unchanged settings, trained once."""
    if not _plain:
        made = tokenizer(ranks, run)
        made.run(folder / "plain")
        _plain["it"] = made.state(), made.recorder
    return _plain["it"]


def test_the_same_again_is_the_same(alone: Ranks, run: Path, tmp_path: Path) -> None:
    state, recorder = plain(alone, run, tmp_path)
    assert sum(recorder.curve("bottom/restarted")) > 0
    again = tokenizer(alone, run)
    again.run(tmp_path / "again")
    assert not differs(again.state(), state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("tokenizer__quantizer__commitment", 0.5),
        ("tokenizer__quantizer__decay", 0.2),
        ("tokenizer__quantizer__init", "random"),
        ("tokenizer__quantizer__continuous_steps", 2),
        ("tokenizer__quantizer__restarts", False),
        ("tokenizer__quantizer__restart_below", 0.01),
        ("tokenizer__quantizer__max_restarts", 1),
        ("tokenizer__quantizer__relief_below", 1.0),
        ("tokenizer__training__learning_rate", 2e-2),
        ("tokenizer__training__warmup", 3),
        ("tokenizer__training__schedule", "cosine"),
        ("tokenizer__training__schedule", "linear"),
        ("tokenizer__training__betas", [0.5, 0.95]),
        ("tokenizer__training__betas", [0.9, 0.5]),
        ("tokenizer__training__weight_decay", 0.1),
        ("tokenizer__training__clip", 0.0),
        ("tokenizer__training__precision", "bf16"),
        ("tokenizer__training__global_batch", 16),
        ("data__shuffle", 64),
    ],
)
def test_every_setting_acts(key: str, value: Any, alone: Ranks, run: Path, tmp_path: Path) -> None:
    state, _ = plain(alone, run, tmp_path)
    changed = tokenizer(alone, run, **{key: value})
    changed.run(tmp_path / "changed")
    assert differs(changed.state(), state)


def test_unquantized_steps_leave_the_codebooks_alone(alone: Ranks, run: Path, tmp_path: Path) -> None:
    """The codes are then set from the first quantized batch; stopped before that and resumed, it is the same."""
    settings = {"tokenizer__quantizer__continuous_steps": 3, "tokenizer__training__checkpoint_every": 2}
    made = tokenizer(alone, run, **settings)
    made.run(tmp_path)
    early = Checkpoint(open_stored(tmp_path, 2)).tensors("model/")
    assert (early["codebooks.0.counts"] == 1).all()
    assert torch.equal(early["codebooks.0.codes"], early["codebooks.0.sums"])
    assert not (made.engine.bare.codebooks[0].counts == 1).any()
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "again" / "step-00000002")
    resumed = tokenizer(alone, run, **settings)
    resumed.run(tmp_path / "again")
    assert not differs(resumed.state(), made.state())


def test_final_learning_rate_acts() -> None:
    half = Training(steps=10, global_batch=2, learning_rate=1.0, schedule="linear", final_learning_rate=0.5)
    assert learning_rate(half, 9) == 0.5  # the last step
    assert learning_rate(half, 3) == pytest.approx(1 - 0.5 / 3)


def test_restarts_off_restarts_nothing(alone: Ranks, run: Path, tmp_path: Path) -> None:
    off = tokenizer(alone, run, tokenizer__quantizer__restarts=False)
    off.run(tmp_path)
    assert sum(off.recorder.curve("bottom/restarted") + off.recorder.curve("top/restarted")) == 0


def test_max_restarts_is_the_most_of_a_step(alone: Ranks, run: Path, tmp_path: Path) -> None:
    made = tokenizer(alone, run)
    made.run(tmp_path)
    assert max(made.recorder.curve("bottom/restarted")) == 3


def test_bf16_keeps_weights_and_codebooks_in_fp32(alone: Ranks, run: Path, tmp_path: Path) -> None:
    made = tokenizer(alone, run, tokenizer__training__precision="bf16")
    made.run(tmp_path)
    assert {value.dtype for value in made.state().values()} == {np.dtype(np.float32)}


def test_clip_limits_the_step_and_the_norm_is_logged_unclipped(alone: Ranks, run: Path, tmp_path: Path) -> None:
    _, recorder = plain(alone, run, tmp_path)
    assert max(recorder.curve("optim/gradient_norm")) > 0.05
    made = tokenizer(alone, run)
    seen: list[float] = []
    adamw = made.engine._strategy.optimizers["adamw"]
    step = adamw.step

    def look() -> None:
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in made.engine.bare.parameters()])))
        step()

    adamw.step = look
    made.run(tmp_path / "again")
    assert seen[0] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 2.2 / 3, 1.4 / 3, 0.2, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.8, 0.4, 0.2, 0.2]),
    ],
)
def test_learning_rate_by_hand(schedule: str, expected: list[float]) -> None:
    settings = {"steps": 6, "global_batch": 2, "learning_rate": 1.0, "warmup": 2, "final_learning_rate": 0.2}
    training = Training(**settings, schedule=schedule)  # type: ignore[arg-type]
    got = [learning_rate(training, step) for step in range(7)]
    assert got == pytest.approx(expected)


def test_the_learning_rate_that_acts_is_the_one_logged(alone: Ranks, run: Path, tmp_path: Path) -> None:
    made = tokenizer(alone, run, tokenizer__training__warmup=2)
    adamw, used = made.engine._strategy.optimizers["adamw"], []
    step = adamw.step

    def look() -> None:
        used.append(adamw.param_groups[0]["lr"])
        step()

    adamw.step = look
    made.run(tmp_path)
    assert used == made.recorder.curve("optim/learning_rate") == [0.005, 0.01, 0.01, 0.01]


LIKELIHOODS: list[dict[str, Any]] = [{"kind": kind} for kind in ("gaussian", "mixture", "autoregressive")]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vqvae2": lambda: build_tokenizer(tiny_recipe().tokenizer),
    **{f"vae, {own['kind']}": partial(test_vae.network, likelihood=own) for own in LIKELIHOODS},
    **{kind: partial(test_priors.make, kind) for kind in test_priors.SMALL if kind != "uniform"},
    **{kind: partial(test_flows.make, kind) for kind in test_flows.FLOWS},
}
LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LSTM, nn.GRU)


@pytest.mark.parametrize("kind", NETWORKS)
def test_only_matrices_and_kernels_decay(kind: str) -> None:
    model, training = NETWORKS[kind](), tiny_recipe(tokenizer__training__weight_decay=0.1).tokenizer.training
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [g for o in make_optimizers(model, training).values() for g in o.param_groups]
    decays = {by_id[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decays.keys() == set(by_id.values())
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        kernel = isinstance(owner, LAYERS) and parameter.dim() > 1
        assert decays[name] == (0.1 if kernel else 0.0), name
    assert set(decays.values()) == {0.0, 0.1}
    if kind == "vae, gaussian":
        (scale,) = (name for name in decays if name.endswith("log_scale"))
        assert decays[scale] == 0.0, "it would be drawn to one grey level"


def test_the_speed_is_that_of_steps_alone(
    alone: Ranks, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that a step moves on by a second, and everything beside it by an hour."""
    every = {f"{key}_every": 1 for key in ("validate", "picture", "hash", "checkpoint", "log")}
    made = tokenizer(alone, run, **{f"tokenizer__training__{key}": value for key, value in every.items()})
    clock = [0.0]

    def takes(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def later(*args: Any) -> Any:
            clock[0] += seconds
            return call(*args)

        return later

    made.task.before_step = takes(1, made.task.before_step)  # type: ignore[method-assign]
    for name in ("validate", "pictures", "check", "extra_state"):
        setattr(made.task, name, takes(3600, getattr(made.task, name)))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    made.run(tmp_path)
    assert clock[0] > STEPS * 4 * 3600
    vectors = made.task.parts["tokens"] * made.engine.training.global_batch
    assert made.recorder.curve("speed/tokens_per_second") == [vectors] * STEPS


def test_codebooks_are_no_parameters(alone: Ranks, run: Path) -> None:
    model = tokenizer(alone, run).engine.bare
    books = {id(value) for module in model.modules() if isinstance(module, Codebook) for value in module.buffers()}
    assert len(books) == 6
    assert not books & {id(parameter) for parameter in model.parameters()}


def test_evaluation_and_pictures_change_nothing(alone: Ranks, run: Path, codes: Path, tmp_path: Path) -> None:
    made, prior = tokenizer(alone, run), prior_experiment(alone, codes, tiny_recipe(prior__networks__0__dropout=0.1))
    pictures = ["images/input_and_reconstruction", "images/levels", "codes/bottom", "codes/top"]
    for experiment, shown in ((made, [*pictures, "bottom/assignments", "top/assignments"]), (prior, [])):
        experiment.run(tmp_path / str(len(shown)))
        before, recorder = experiment.state(), Recorder()
        modes = [module.training for module in experiment.engine.bare.modules()]
        experiment.task.validate()
        experiment.task.pictures(9, recorder)  # type: ignore[arg-type]
        assert not differs(experiment.state(), before)
        assert [module.training for module in experiment.engine.bare.modules()] == modes
        assert recorder.shown == shown


def test_validation_gives_a_sign_of_life_with_each_batch(alone: Ranks, run: Path, codes: Path, tmp_path: Path) -> None:
    for number, made in enumerate(
        (
            tokenizer(alone, run, evaluate__batch=5),
            prior_experiment(alone, codes, tiny_recipe(evaluate={"batch": 5})),
        )
    ):
        made.run(tmp_path / str(number))  # sets the codebooks, and the loop's own watchdog
        assert made.task.alive is not None
        signs: list[int] = []
        made.task.alive = lambda: signs.append(1)  # noqa: B023
        batches = len(list(made.task._held_out()))  # type: ignore[attr-defined]
        made.task.validate()
        assert len(signs) == batches > 1


def test_validation_is_that_of_the_held_out_images(alone: Ranks, run: Path, tmp_path: Path) -> None:
    """A mean over images: a mean of the batches' means would give the images of the short last one too much weight."""
    from vqscale.evaluation.metrics import mse, psnr
    from vqscale.models.pixels import from_uint8, to_uint8

    made = tokenizer(alone, run, evaluate__batch=15)  # the sixteenth is alone
    figures = made.run(tmp_path)
    made.engine.bare.eval()
    images = np.concatenate(list(made.task._held_out()))  # type: ignore[attr-defined]
    with torch.no_grad():
        rebuilt = to_uint8(made.engine.bare(from_uint8(images, torch.device("cpu"))).images)
    assert len(images) == 16
    errors = mse(images, rebuilt)
    assert figures["mse"] == pytest.approx(errors.mean(), rel=1e-2)  # that one is rounded to uint8
    assert (errors[:15].mean() + errors[15]) / 2 != pytest.approx(errors.mean(), rel=2e-2)
    assert figures["psnr"] == pytest.approx(psnr(mse(images, rebuilt)).mean(), rel=1e-2)


def test_a_loss_that_is_no_number_stops_the_run(alone: Ranks, run: Path, tmp_path: Path) -> None:
    made = tokenizer(alone, run, tokenizer__training__learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"step \d: the last \d steps were skipped.*; lower the learning rate"):
        made.run(tmp_path)


def test_a_checkpoint_of_no_numbers_is_never_committed(alone: Ranks, run: Path, tmp_path: Path) -> None:
    """The loss is looked at when it is logged; a checkpoint between two log lines must not slip through."""
    settings = {"steps": 40, "log_every": 40, "checkpoint_every": 3, "learning_rate": 1e30, "warmup": 0}
    made = tokenizer(alone, run, **{f"tokenizer__training__{key}": value for key, value in settings.items()})
    with pytest.raises(FloatingPointError):
        made.run(tmp_path)
    assert newest(tmp_path) == (None, [])


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_class_dropout(alone: Ranks, codes: Path, share: float) -> None:
    """A share of the samples forgets its class."""
    made = prior_experiment(alone, codes, tiny_recipe(prior__class_dropout=share))
    seen: list[torch.Tensor] = []
    made.engine.bare.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    dropped = []
    with torch.no_grad():
        for batch in made.batches(60):
            made.task.losses(batch)
            kept = seen[-1] != 12
            assert (seen[-1][kept] == batch.fields["label"][kept]).all()
            dropped.append((~kept).float().mean())
    assert abs(float(torch.stack(dropped).mean()) - share) <= 0.28 * share


def test_a_skipped_update_is_skipped_everywhere(alone: Ranks, run: Path, tmp_path: Path) -> None:
    """The codebooks move behind the optimizer's step: where that fails, forward and backward have changed nothing."""
    made = tokenizer(alone, run, tokenizer__quantizer__init="random")
    before, failed = made.state(), []

    def overflow(step: int) -> torch.Tensor:
        failed.append(step)
        raise FloatingPointError("overflow")

    made.engine.optimise = overflow  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="overflow"):
        made.run(tmp_path)
    assert failed == [0]
    assert not differs(made.state(), before)


def test_a_resumed_run_takes_the_recipes_settings(alone: Ranks, run: Path, tmp_path: Path) -> None:
    """What was changed in the recipe acts; the checkpoint has the state alone."""
    tokenizer(alone, run).run(tmp_path)
    changes = {"betas": [0.7, 0.8], "weight_decay": 0.3}
    changed = tokenizer(alone, run, **{f"tokenizer__training__{key}": value for key, value in changes.items()})
    start, notes = changed.checkpoints(tmp_path).resume(changed.task)
    assert start == STEPS
    assert any(note.startswith("goes on with another training.betas") for note in notes)
    groups = changed.engine._strategy.optimizers["adamw"].param_groups  # type: ignore[attr-defined]
    assert {tuple(group["betas"]) for group in groups} == {(0.7, 0.8)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


def test_loop_needs_no_tracker(alone: Ranks, run: Path, tmp_path: Path) -> None:
    made = tokenizer(alone, run)
    figures = made.run(tmp_path / "silent", tracked=False)
    assert set(figures) == {"mse", "psnr"}
    assert not differs(made.state(), plain(alone, run, tmp_path)[0])
