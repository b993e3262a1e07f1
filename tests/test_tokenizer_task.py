"""The tokenizer's task in one process: every setting acts, the adversarial term is what it says, averages go along."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.recipes import tiny_recipe
from tests.training_helpers import Experiment, State, clock_run, one_process, tokenizer_experiment
from vqscale.errors import UserError
from vqscale.models.lpips import STAGES, load_lpips
from vqscale.models.pixels import from_uint8
from vqscale.training.adversary import Adversary
from vqscale.training.averaging import AveragedWeights, apply_average
from vqscale.training.build import build_tokenizer
from vqscale.training.distributed import Ranks
from vqscale.training.pieces import whole
from vqscale.training.tokenizer_task import TokenizerTask
from vqscale.training.transfer import DeviceBatch

STEPS = 3
ADVERSARIAL = {"start": 0, "width": 4, "layers": 1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clock_run(tmp_path_factory.mktemp("task") / "run")


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator, found, below = torch.Generator().manual_seed(0), {}, 3
    for stage, (channels, numbers) in enumerate(STAGES):
        for number in numbers:
            shape = (channels, below, 3, 3)
            found[f"features.{number}.weight"] = torch.randn(shape, generator=generator) * (2 / (9 * below)) ** 0.5
            found[f"features.{number}.bias"] = torch.zeros(channels)
            below = channels
        found[f"lin{stage}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator) / channels
    path = tmp_path_factory.mktemp("weights") / "lpips.safetensors"
    save_file(found, path)
    return str(path)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with one_process(monkeypatch) as ranks:
        yield ranks


def tokenizer(ranks: Ranks, run: Path, **overrides: Any) -> Experiment:
    """The tiny recipe, changed so that all settings have something to do within a few steps.

    In overrides `q__`, `l__` and `t__` stand for `tokenizer__quantizer__`, `tokenizer__losses__` and
    `tokenizer__training__`.
    """
    words = {"q": "quantizer", "l": "losses", "t": "training"}
    settings: dict[str, Any] = {"quantizer": {"decay": 0.5, "restart_below": 0.5, "max_restarts": 3}, "losses": {}}
    tree: dict[str, Any] = {f"tokenizer__{key}": value for key, value in settings.items()}
    training = {
        "steps": STEPS,
        "learning_rate": 1e-2,
        "validate_every": 99,
        "picture_every": 99,
        "checkpoint_every": 99,
    }
    tree |= {f"tokenizer__training__{key}": value for key, value in training.items()}
    for key, value in overrides.items():
        head, _, rest = key.partition("__")
        if head in ("q", "l"):
            settings[words[head]][rest] = value
        else:
            tree[f"tokenizer__training__{rest}" if head == "t" else key] = value
    return tokenizer_experiment(ranks, run, tiny_recipe(**tree))


def task_of(made: Experiment) -> TokenizerTask:
    assert isinstance(made.task, TokenizerTask)
    return made.task


def trained(made: Experiment, folder: Path) -> tuple[State, dict[str, float], dict[str, float]]:
    """State, figures of the last line, and validation after a training."""
    validation = made.run(folder)
    return made.state(), made.recorder.lines[STEPS], validation


_base: dict[str, Any] = {}


def base(ranks: Ranks, run: Path, folder: Path, **overrides: Any) -> Any:
    """A training of some settings, done once."""
    key = repr(overrides)
    if key not in _base:
        _base[key] = trained(tokenizer(ranks, run, **overrides), folder / "base")
    return _base[key]


def differs(one: State, other: State) -> bool:
    """Whether networks and codebooks differ, in shape or in value."""
    return any(name not in other or not np.array_equal(value, other[name]) for name, value in one.items())


# --- every setting acts


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {"q__learning": "gradient"}),
        ({}, {"q__distance": "cosine"}),
        ({"q__learning": "gradient"}, {"q__distance": "cosine"}),
        ({"q__learning": "gradient"}, {"q__restarts": False}),
        ({"q__learning": "gradient"}, {"t__betas": [0.5, 0.95]}),
        ({}, {"q__init": "kmeans"}),
        ({"q__init": "kmeans"}, {"q__kmeans_iterations": 1}),
        ({}, {"l__reconstruction": "l1"}),
        ({}, {"l__reconstruction_weight": 4.0}),
        ({}, {"l__adversarial": ADVERSARIAL}),
        ({"l__adversarial": ADVERSARIAL}, {"l__adversarial": ADVERSARIAL | {"start": 2}}),
        ({"l__adversarial": ADVERSARIAL}, {"l__adversarial": ADVERSARIAL | {"weight": 0.1}}),
        ({"l__adversarial": ADVERSARIAL}, {"l__adversarial": ADVERSARIAL | {"adaptive": False}}),
        ({"l__adversarial": ADVERSARIAL}, {"l__adversarial": ADVERSARIAL | {"width": 8}}),
        ({"l__adversarial": ADVERSARIAL}, {"l__adversarial": ADVERSARIAL | {"layers": 2}}),
        ({"l__adversarial": ADVERSARIAL}, {"l__adversarial": ADVERSARIAL | {"relative_learning_rate": 3.0}}),
        ({}, {"tokenizer__levels__0__project": 4}),
        ({}, {"tokenizer__levels__1__hidden": 8}),
        ({}, {"tokenizer__levels__1__residual_blocks": 2}),
        ({}, {"tokenizer__levels__0__residual_hidden": 4}),
    ],
)
def test_every_setting_acts(
    given: dict[str, Any], changed: dict[str, Any], alone: Ranks, run: Path, tmp_path: Path
) -> None:
    before, figures, _ = base(alone, run, tmp_path, **given)
    after, other, _ = trained(tokenizer(alone, run, **given | changed), tmp_path / "changed")
    assert differs(after, before)
    assert figures["loss/total"] != other["loss/total"]


def test_the_perceptual_term_acts(alone: Ranks, run: Path, lpips_weights: str, tmp_path: Path) -> None:
    plain, _, _ = base(alone, run, tmp_path)
    found = []
    for weight in (0.5, 2.0):
        term = {"weights": [lpips_weights], "weight": weight}
        made = tokenizer(alone, run, l__perceptual=term, t__steps=1)
        made.run(tmp_path / str(weight))
        figures = made.recorder.lines[1]
        commitment = figures["loss/commitment_bottom"] + figures["loss/commitment_top"]
        expected = figures["loss/reconstruction"] + weight * figures["loss/perceptual"] + 0.25 * commitment
        assert figures["loss/total"] == pytest.approx(expected, rel=1e-5)
        assert figures["validation/lpips"] > 0
        found.append(made.state())
    assert differs(found[0], plain)
    assert differs(*found)


def test_absent_weights_stop_before_training(alone: Ranks, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^tokenizer.losses.perceptual.weights: no file .*absent.pth;"):
        tokenizer(alone, run, l__perceptual={"weights": str(tmp_path / "absent.pth")})


def test_the_window_is_as_long_as_said(alone: Ranks, run: Path, tmp_path: Path) -> None:
    lines = {}
    for window in (1, 2):
        made = tokenizer(alone, run, q__window=window)
        made.run(tmp_path / str(window))
        lines[window] = made.recorder.lines
        assert task_of(made)._window.full
    for name in ("bottom", "top"):
        batch = [lines[1][step][f"{name}/perplexity"] for step in (2, 3)]
        assert batch == pytest.approx([lines[1][step][f"{name}/batch_perplexity"] for step in (2, 3)])
        assert lines[2][3][f"{name}/batch_perplexity"] == pytest.approx(sum(batch) / 2)
        assert lines[2][3][f"{name}/used"] >= max(lines[1][step][f"{name}/used"] for step in (2, 3))
        for step in (1, 2, 3):
            line = lines[2][step]
            assert line[f"{name}/dead"] == round(16 * (1 - line[f"{name}/used"]))


def test_settings_reach_the_codebook_of_every_level() -> None:
    quantizer = {"decay": 0.7, "restart_below": 0.2, "max_restarts": 5}
    for learning in ("ema", "gradient"):
        levels = [
            {"name": "bottom", "downsample": 4, "codes": 16, "dim": 8},
            {"name": "top", "downsample": 2, "codes": 24, "dim": 6},
        ]
        settings = tiny_recipe(
            tokenizer__levels=levels, tokenizer__quantizer=quantizer | {"learning": learning}
        ).tokenizer
        network = build_tokenizer(settings)
        assert [shape.factor for shape in network.shapes] == [4, 2]
        assert [tuple(book.codes.shape) for book in network.codebooks] == [(16, 8), (24, 6)]
        for book in network.codebooks:
            assert (book.decay, book.restart_below, book.max_restarts) == (0.7, 0.2, 5)
            assert getattr(book, "betas", (0.9, 0.95)) == settings.training.betas


# --- a step may have several batches, or fail


def halves(batch: DeviceBatch) -> list[DeviceBatch]:
    return [
        DeviceBatch(batch.step, {key: value[part] for key, value in batch.fields.items()}, batch.index[part])
        for part in (slice(0, 4), slice(4, 8))
    ]


def test_micro_batches_add_up_to_the_step(alone: Ranks, run: Path) -> None:
    made = tokenizer(alone, run)
    task, books, batch = task_of(made), made.engine.bare.codebooks, made.batches(1)[0]
    task.before_step(batch)
    first = {name: value.clone() for name, value in books.state_dict().items()}
    found = []
    for parts in ([batch], halves(batch)):
        books.load_state_dict(first)
        task._statistics = []
        for part in parts:
            task.losses(part)
        task.after_step()
        found.append(({name: value.clone() for name, value in books.state_dict().items()}, task.figures()))
    (whole, figures), (added, other) = found
    torch.testing.assert_close(added, whole, rtol=1e-5, atol=1e-6)
    assert other == pytest.approx(figures, rel=1e-5)
    assert any(not torch.equal(first[name], whole[name]) for name in first)
    assert figures["bottom/restarted"] > 0


def test_the_discriminators_gradient_is_a_mean_over_micro_batches(alone: Ranks, run: Path) -> None:
    made = tokenizer(alone, run, l__adversarial=ADVERSARIAL)
    adversary, batch, found = adversary_of(made), made.batches(1)[0], []
    for parts in ([batch], halves(batch)):
        made.task.before_step(batch)
        for part in parts:
            made.task.losses(part)
        adversary.step(0.0)
        found.append([weight.grad.clone() for weight in adversary.network.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_a_step_that_failed_leaves_nothing_to_the_next(alone: Ranks, run: Path) -> None:
    made, other = (tokenizer(alone, run, l__adversarial=ADVERSARIAL) for _ in range(2))
    first, second = made.batches(2)
    for experiment in (made, other):
        experiment.task.before_step(first)  # sets the codes
    made.task.losses(first)  # no optimizer step follows
    for experiment in (made, other):
        experiment.task.before_step(second)
        experiment.task.losses(second)
        experiment.task.after_step()
    assert not differs(made.state(), other.state())
    one, two = task_of(made).extra_state(), task_of(other).extra_state()
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_batch_goes_through_the_tokenizer_once(alone: Ranks, run: Path, tmp_path: Path) -> None:
    made = tokenizer(alone, run, l__adversarial=ADVERSARIAL)
    calls: list[int] = []
    made.engine.bare.encoders[0].register_forward_hook(lambda module, given, out: calls.append(int(module.training)))
    batch = made.batches(1)[0]
    made.task.before_step(batch)
    calls.clear()
    made.task.losses(batch)["total"].backward()
    made.task.after_step()
    assert calls == [1]


# --- the adversarial term


def adversary_of(made: Experiment) -> Adversary:
    found = task_of(made)._adversary
    assert found is not None
    return found


def flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize(("adaptive", "perceptual"), [(True, False), (False, False), (True, True)])
def test_the_adversarial_term_is_that_of_a_direct_computation(
    alone: Ranks, run: Path, lpips_weights: str, adaptive: bool, perceptual: bool
) -> None:
    """Every gradient of tokenizer and discriminator, and the weight of VQGAN's equation 7, by autograd."""
    settings: dict[str, Any] = {"l__adversarial": ADVERSARIAL | {"weight": 0.7, "adaptive": adaptive}}
    if perceptual:
        settings["l__perceptual"] = {"weights": lpips_weights, "weight": 2.0}
    made = tokenizer(alone, run, **settings, l__reconstruction_weight=3.0)
    model, network, batch = made.engine.bare, adversary_of(made).network, made.batches(1)[0]
    made.task.before_step(batch)
    images = from_uint8(batch.fields["image"], CPU)

    output = model(images)
    own = 3.0 * F.mse_loss(output.images, images)
    if perceptual:
        own = own + 2.0 * load_lpips([lpips_weights], "")(output.images, images).mean()
    other = -network(output.images).mean()
    last = model.to_pixels.weight
    pulls = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (own, other)]
    weight = 0.7 * (pulls[0] / (pulls[1] + 1e-4) if adaptive else 1.0)
    commitment = 0.25 * sum(level.commitment for level in output.levels)
    total = own + weight * other + commitment
    expected = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    hinge = 0.5 * (F.relu(1 - network(images)).mean() + F.relu(1 + network(output.images.detach())).mean())
    learned = torch.autograd.grad(hinge, list(network.parameters()))

    losses = made.task.losses(batch)
    assert float(losses["adversarial_weight"]) == pytest.approx(float(weight), rel=1e-4)
    assert float(losses["adversarial"]) == pytest.approx(float(other.detach()), rel=1e-4)
    assert float(losses["discriminator"]) == pytest.approx(float(hinge.detach()), rel=1e-4)
    assert float(losses["total"].detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    losses["total"].backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    for parameter, gradient in zip(network.parameters(), learned, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_the_discriminator_waits_for_its_start_and_then_learns(alone: Ranks, run: Path, tmp_path: Path) -> None:
    made = tokenizer(alone, run, l__adversarial=ADVERSARIAL | {"start": 2})
    network, after_step = adversary_of(made).network, made.task.after_step
    first = flat(network)
    seen: list[Tensor] = []

    def look() -> None:
        after_step()
        seen.append(flat(network))

    made.task.after_step = look  # type: ignore[method-assign]
    made.run(tmp_path)
    assert [torch.equal(first, weights) for weights in seen] == [True, True, False]
    assert [step for step, line in made.recorder.lines.items() if "loss/adversarial" in line] == [3]


def test_a_discriminators_gradient_that_is_not_finite_is_left_out(alone: Ranks, run: Path) -> None:
    """Neither its weights nor its moments take it in; the next one is taken."""
    made = tokenizer(alone, run, l__adversarial=ADVERSARIAL)
    adversary, batches = adversary_of(made), made.batches(3)
    for number, batch in enumerate(batches):
        before = {name: value.clone() for name, value in adversary.state().items()}
        made.task.before_step(batch)
        made.task.losses(batch)
        if number == 1:
            gradient = adversary._weights[0].grad
            assert gradient is not None
            gradient[0] = torch.inf
        made.task.after_step()
        after = adversary.state()
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after)
        assert same == (number == 1)
        assert all(value.isfinite().all() for value in after.values())
    assert made.task.figures()["optim/discriminator_skipped"] == adversary.skipped == 1


def test_discriminator_and_optimizer_are_saved(alone: Ranks, run: Path) -> None:
    """Restored into fresh ones, the next step is the same bit by bit."""
    made = tokenizer(alone, run, l__adversarial=ADVERSARIAL, tokenizer__ema_decay=0.9)
    other = tokenizer(alone, run, l__adversarial=ADVERSARIAL, tokenizer__ema_decay=0.9)
    batches = made.batches(3)
    for batch in batches[:2]:
        made.task.before_step(batch)
        made.task.losses(batch)
        made.task.after_step()
    other.engine.bare.load_state_dict(made.engine.bare.state_dict())
    for mine, theirs in zip(other.task.pieces(), made.task.pieces(), strict=True):
        mine.fill(theirs.values())
    task_of(other).load_extra_state({name: value.clone() for name, value in task_of(made).extra_state().items()})
    for experiment in (made, other):
        experiment.task.before_step(batches[2])
        experiment.task.losses(batches[2])
        experiment.task.after_step()
    one, two = task_of(made).extra_state(), task_of(other).extra_state()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any("exp_avg_sq" in name for name in one)


# --- averaged weights


def average_of(made: Experiment) -> dict[str, Tensor]:
    """As a checkpoint holds it."""
    return {piece.name.removeprefix("extra/"): piece.local for piece in task_of(made).pieces()}


def test_the_average_is_the_ema_of_the_weights(alone: Ranks, run: Path, tmp_path: Path) -> None:
    made = tokenizer(alone, run, tokenizer__ema_decay=0.15)
    name, weight = next(iter(made.engine.bare.named_parameters()))
    expected, after_step = weight.detach().clone(), made.task.after_step
    decays = iter([0.1, 0.15, 0.15])  # (1 + n) / (10 + n) at the beginning

    def follow() -> None:
        nonlocal expected
        after_step()
        decay = next(decays)
        expected = decay * expected + (1 - decay) * weight.detach()

    made.task.after_step = follow  # type: ignore[method-assign]
    made.run(tmp_path)
    torch.testing.assert_close(average_of(made)[f"average.{name}"], expected)


def test_the_average_is_judged_and_the_weights_are_trained(alone: Ranks, run: Path, tmp_path: Path) -> None:
    plain, figures, validation = base(alone, run, tmp_path)
    made = tokenizer(alone, run, tokenizer__ema_decay=0.99)
    state, other, judged = trained(made, tmp_path / "averaged")
    assert not differs(state, plain)  # codebooks among them: they are not averaged
    assert other["loss/total"] == figures["loss/total"]
    assert judged["mse"] != validation["mse"]
    apply_average(made.engine.bare, average_of(made))
    task_of(made)._averaged = None
    assert made.task.validate() == pytest.approx(judged, rel=1e-6)


def test_the_average_is_applied_and_taken_back_bit_by_bit() -> None:
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = AveragedWeights(lambda: [whole(name, value) for name, value in network.named_parameters()], 0.9)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    changed = [parameter.detach().clone() for parameter in network.parameters()]
    with averaged.applied():
        assert all(map(torch.equal, network.parameters(), before))
    assert all(map(torch.equal, network.parameters(), changed))


def test_a_resume_without_the_state_is_refused(alone: Ranks, run: Path, tmp_path: Path) -> None:
    plain = tokenizer(alone, run)
    plain.engine.materialise_optimizer()
    plain.checkpoints(tmp_path).save(plain.task, 1, final=True)
    for settings in ({"tokenizer__ema_decay": 0.9}, {"l__adversarial": ADVERSARIAL}):
        made = tokenizer(alone, run, **settings)
        for use in (lambda made=made: made.task.before_step(made.batches(2)[1]), made.task.validate):
            with pytest.raises(UserError, match="resumed without the state of `ema_decay`"):
                use()
        with pytest.raises(UserError, match=r"the checkpoint has no|extra/average\.\S+ is absent in it"):
            made.checkpoints(tmp_path).resume(made.task)


def test_stopped_and_resumed_is_bit_identical(alone: Ranks, run: Path, tmp_path: Path) -> None:
    settings = {
        "tokenizer__ema_decay": 0.9,
        "l__adversarial": ADVERSARIAL | {"start": 1},
        "q__learning": "gradient",
        "t__checkpoint_every": 2,
        "t__steps": 4,
    }
    whole, saved = tokenizer(alone, run, **settings), {}
    after_step = whole.task.after_step

    def look() -> None:
        after_step()
        if task_of(whole)._step == 1:
            saved.update({name: value.clone() for name, value in task_of(whole).extra_state().items()})

    whole.task.after_step = look  # type: ignore[method-assign]
    whole.run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "step-00000002", tmp_path / "resumed" / "step-00000002")
    resumed = tokenizer(alone, run, **settings)
    task_of(resumed).load_extra_state(saved)
    resumed.run(tmp_path / "resumed")
    assert resumed.recorder.curve("loss/total") == whole.recorder.curve("loss/total")[2:]
    assert resumed.recorder.curve("top/perplexity") == whole.recorder.curve("top/perplexity")[2:]
    assert not differs(resumed.state(), whole.state())
    one, other = task_of(resumed).extra_state(), task_of(whole).extra_state()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- warnings


def test_no_warning_where_none_is_wanted(alone: Ranks, run: Path, tmp_path: Path, capsys: Any) -> None:
    found = {}
    for below in (0.0, 1.0):
        made = tokenizer(alone, run, q__collapse_below=below, q__window=1)
        made.run(tmp_path / str(below))
        found[below] = task_of(made).warnings
    assert found[0.0] == {}
    assert list(found[1.0]) == ["bottom", "top"]
