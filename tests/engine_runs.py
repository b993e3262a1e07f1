"""What the ranks of `test_engine` do: small trainings under every strategy, many in one process start."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.recipes import tiny_recipe
from tests.training_helpers import Experiment, Recorder, many_streams, prior_experiment, tokenizer_experiment
from vqscale.config.recipe import Recipe
from vqscale.training import zero
from vqscale.training.distributed import Ranks, process_group
from vqscale.training.pieces import assemble, fill
from vqscale.training.steps import Steps
from vqscale.training.tokenizer_task import TokenizerTask
from vqscale.training.transfer import DeviceBatch

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
STEPS, HALF = 6, 3


@dataclass
class Trained:
    """What a few steps left behind on one rank."""

    losses: list[float]
    """Of each step, a mean over the ranks."""
    codebooks: dict[str, Tensor]
    restarts: int
    counts: list[Tensor]
    """Assignments of the last step, a level."""
    weights: dict[str, Tensor]
    """Parameters, whole."""
    inventory: dict[str, tuple[tuple[int, ...], str]]
    """Shape and dtype of every piece, by name."""
    validation: dict[str, float] = field(default_factory=dict)


def tokenizer_recipe(strategy: str, **training: Any) -> Recipe:
    """Codes fall dead and are restarted within a few steps; weights are averaged beside."""
    training = {"steps": STEPS, "learning_rate": 2e-3, "weight_decay": 0.1} | training
    return tiny_recipe(
        **many_streams(**{f"tokenizer__training__{key}": value for key, value in training.items()}),
        tokenizer__quantizer={"decay": 0.7, "restart_below": 0.5, "max_restarts": 4},
        tokenizer__ema_decay=0.5,
        resources__strategy=strategy,
    )


def prior_recipe(strategy: str, **training: Any) -> Recipe:
    training = {"steps": STEPS, "learning_rate": 3e-3} | training
    settings = {f"prior__training__{key}": value for key, value in training.items()}
    networks = [{"kind": "pixelcnn", "layers": 2, "width": 16}, {"kind": "transformer", "layers": 2, "width": 16}]
    return tiny_recipe(**many_streams(**settings, prior__networks=networks, resources__strategy=strategy))


@contextmanager
def joined() -> Iterator[Ranks]:
    """The process group. With three ranks, ZeRO-3 gathers every weight when it is used, and otherwise none of these."""
    with process_group("cpu", 60) as ranks:
        zero.KEPT_WHOLE = 0 if ranks.world == 3 else zero.KEPT_WHOLE
        yield ranks


def full(made: Experiment) -> dict[str, Tensor]:
    """All state by canonical name, whole."""
    pieces = [*made.engine.pieces(), *made.task.pieces()]
    return {name: value.clone() for name, value in assemble(pieces, made.ranks)}


def walk(made: Experiment, batches: Sequence[DeviceBatch], steps: Steps | None = None) -> list[float]:
    """Steps of the loop; losses as a mean over the ranks."""
    steps, losses = steps or Steps(made.task), []
    made.engine.model.train()
    for batch in batches:
        steps.take(batch)
        total = steps.losses.get("total", torch.zeros(())).double().clone()
        losses.append(float(made.ranks.sum(total)) / made.ranks.world)
    return losses


def described(made: Experiment, losses: list[float], restarts: int = 0) -> Trained:
    state = full(made)
    books = {name: value for name, value in made.engine.bare.named_buffers() if name.startswith("codebooks.")}
    return Trained(
        losses,
        {name: value.clone() for name, value in books.items()},
        restarts,
        [level.counts.clone() for level in made.task._levels] if isinstance(made.task, TokenizerTask) else [],
        {name: value for name, value in state.items() if name.startswith("model/") and "codebooks" not in name},
        {name: (tuple(value.shape), str(value.dtype)) for name, value in state.items()},
        made.task.validate(),
    )


def train_tokenizer(ranks: Ranks, run: Path, recipe: Recipe, states: Path | None = None) -> Trained:
    """All steps from fresh weights; the state half-way goes into a file."""
    made = tokenizer_experiment(ranks, run, recipe)
    restarts, losses = 0, []
    for batch in made.batches(recipe.tokenizer.training.steps):
        losses += walk(made, [batch])
        restarts += sum(int(level.restarted) for level in made.task._levels)  # type: ignore[attr-defined]
        if states and batch.step == HALF - 1:
            state = full(made)
            if ranks.first:
                save_file(
                    {k: v.clone().contiguous() for k, v in state.items()},
                    states / f"{recipe.resources.strategy}.safetensors",
                )
    return described(made, losses, restarts)


def survey(run: Path, codes: Path, states: Path | None, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every strategy with every set of options, and the prior: `STRATEGY/OPTION` → what was trained."""
    with joined() as ranks:
        found: dict[str, Any] = {}
        for strategy in STRATEGIES:
            for option, training in options.items():
                where = states if option == "plain" else None
                found[f"{strategy}/{option}"] = train_tokenizer(
                    ranks, run, tokenizer_recipe(strategy, **training), where
                )
            made = prior_experiment(ranks, codes, prior_recipe(strategy))
            found[f"{strategy}/prior"] = described(made, walk(made, made.batches(STEPS)))
            found[f"{strategy}/skipped"] = skip(ranks, run, tokenizer_recipe(strategy))
        return found


def skip(ranks: Ranks, run: Path, recipe: Recipe) -> dict[str, bool]:
    """An infinite gradient on the last rank alone, between two good steps; and evaluation."""
    made, other = (tokenizer_experiment(ranks, run, recipe) for _ in range(2))
    batches, steps = made.batches(3), Steps(made.task)
    for each in (made, other):
        walk(each, batches[:2])
    before, losses = full(made), made.task.losses

    def spoiled(batch: DeviceBatch) -> dict[str, Tensor]:
        found = losses(batch)
        return found | {"total": found["total"] * torch.inf} if ranks.rank == ranks.world - 1 else found

    made.task.losses = spoiled  # type: ignore[method-assign]
    walk(made, batches[2:], steps)
    made.task.losses = losses  # type: ignore[method-assign]
    after = full(made)
    made.task.validate()
    made.task.pictures(3, Recorder() if ranks.first else None)  # type: ignore[arg-type]
    evaluated = full(made)
    for each in (made, other):
        walk(each, batches[2:])
    return {
        "was skipped": (steps.skipped, steps.in_a_row) == (1, 1),
        "skipping changed nothing": same(before, after),
        "evaluation changed nothing": same(before, evaluated),
        "the next step is as if nothing had been": same(full(made), full(other)),
        "the next step changed something": not same(before, full(made)),
    }


def move(run: Path, states: Path) -> dict[str, Any]:
    """Every strategy takes over the state of every other, and goes on from one of them."""
    with joined() as ranks:
        found: dict[str, Any] = {}
        for place, strategy in enumerate(STRATEGIES):
            made = tokenizer_experiment(ranks, run, tokenizer_recipe(strategy), weights=99)
            made.task._ready = True  # type: ignore[attr-defined]
            # The neighbour's state comes last, and training goes on from it.
            others = [STRATEGIES[(place + n) % len(STRATEGIES)] for n in range(2, len(STRATEGIES) + 2)]
            for other in others:
                state = load_file(states / f"{other}.safetensors")
                made.engine.materialise_optimizer()
                fill([*made.engine.pieces(), *made.task.pieces()], state)
                made.engine.loaded()
                found[f"{other} to {strategy}"] = same(full(made), state)
            found[strategy] = walk(made, made.batches(STEPS - HALF, HALF))
        return found


def disturb(run: Path, folder: Path) -> tuple[list[float], list[float], str]:
    """A sharded run, one that goes on from its checkpoint under another strategy, and one with a tampered codebook.

    Returns:
        Losses of the first two (on rank 0), and what the last says on this rank.
    """
    with joined() as ranks:
        losses = []
        for strategy, start in (("fsdp2", 0), ("zero3", HALF)):
            if start and ranks.first:
                shutil.copytree(folder / "fsdp2" / f"step-{start:08d}", folder / "zero3" / f"step-{start:08d}")
            ranks.barrier()
            recipe = tokenizer_recipe(strategy, checkpoint_every=HALF)
            made = tokenizer_experiment(ranks, run, recipe, weights=start)
            made.run(folder / strategy)
            losses.append(made.recorder.curve("loss/total") if ranks.first else [])
        return losses[0], losses[1], tamper(made)


def tamper(made: Experiment) -> str:
    """The codebook of one rank is changed between two comparisons: what the run says on this rank."""
    made.task.check(1)
    if made.ranks.rank == 1:
        made.engine.bare.codebooks[1].sums[2, 3] += 1e-6
    try:
        made.task.check(2)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
