"""Small trainings with the real engine, loop, loader and tasks, for tests in one process or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from pipelines import generate, pack
from pipelines.outcome import leave_marker
from pipelines.stage import Finish, Stage
from tests.recipes import tiny_recipe, write_recipe
from vqscale.config.layout import RunLayout
from vqscale.config.recipe import Recipe
from vqscale.config.training import Training
from vqscale.data.code_records import CodeRecord, manifest_from_records, read_records, write_record
from vqscale.data.code_source import CodeSource
from vqscale.data.codes import CodeBlock, write_code_shard
from vqscale.data.image_source import ImageSource
from vqscale.data.loader import Loader
from vqscale.data.manifest import CodeLevel, Manifest, read_manifest, write_manifest
from vqscale.data.order import StreamOrder
from vqscale.data.reader import EvaluationReader
from vqscale.data.shards import open_shards
from vqscale.data.source import Source
from vqscale.faults import NO_FAULTS, Faults
from vqscale.quarantine import Quarantine
from vqscale.training.build import build_prior, grid_shapes
from vqscale.training.checkpoints.keeper import Checkpoints
from vqscale.training.data_watch import DataWatch
from vqscale.training.distributed import Ranks, process_group
from vqscale.training.engine import Engine
from vqscale.training.exemplars import show_exemplars
from vqscale.training.loop import Loop
from vqscale.training.pieces import Piece, assemble, whole
from vqscale.training.prior_task import PriorTask
from vqscale.training.task import Task
from vqscale.training.tasks import tokenizer_task
from vqscale.training.transfer import DeviceBatch, DeviceBatches, tensors
from vqscale.training.vigil import vigil
from vqscale.training.watchdog import Watchdog

State = dict[str, np.ndarray]

torch.set_num_threads(1)  # what tests compute is small: more threads would wait for each other


class OneRank:
    """A world of one, without a process group."""

    rank, world, first = 0, 1, True
    device = torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def barrier(self) -> None:
        pass


def stage_of(name: str, run: Path, ranks: Any = None) -> Stage:
    layout = RunLayout(run)
    return Stage(name, layout, layout.read_recipe(), ranks or OneRank(), 1)


def task_of(name: str, run: Path, task: int, tasks: int, ranks: Any = None) -> Stage:
    """A stage as one task of several has it."""
    layout = RunLayout(run, task)
    return Stage(name, layout, layout.read_recipe(), ranks or OneRank(), 1, tasks=tasks)


def end_task(stage: Stage, finish: Finish, facts: dict[str, Any]) -> None:
    """What `run_stage` does when a task of an array has done its share."""
    leave_marker(stage.layout, stage.name, stage.tasks, lambda parts: finish(stage, parts), facts)


def whole_stage(module: Any, stage: Stage) -> dict[str, Any]:
    """All of a stage that can be an array, as one task does it; its figures, on every rank."""
    facts = module.main(stage)
    stage.ranks.barrier()
    figures: dict[str, Any] = stage.ranks.gather(module.finish(stage, [facts]) if stage.ranks.first else None)[0]
    return figures


def clock_run(run: Path, **overrides: Any) -> Path:
    """A run directory whose clocks are drawn and packed, as its first two stages leave it."""
    run.mkdir(parents=True)
    write_recipe(run / "recipe.yaml", **overrides)
    generate.main(stage_of("generate", run))
    pack.main(stage_of("pack", run))
    return run


def many_streams(**overrides: Any) -> dict[str, Any]:
    """Overrides of the tiny recipe: twelve streams, which 1, 2, 3 and 4 ranks can share."""
    common = {
        "data__clocks": {"train": 240, "validation": 30, "shards": 12},
        "data__streams": 12,
        "tokenizer__training__global_batch": 24,
        "prior__training__global_batch": 24,
    }
    return common | overrides


@contextmanager
def tf32_allowed() -> Iterator[Callable[[], bool]]:
    """As torch allows it by default in convolutions, in all products; gives what says whether any may still have it."""
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cublas.allow_tf32
    cudnn.allow_tf32 = cublas.allow_tf32 = True
    try:
        yield lambda: cudnn.allow_tf32 or cublas.allow_tf32
    finally:
        cudnn.allow_tf32, cublas.allow_tf32 = before


@contextmanager
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A process group of this process alone."""
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in {**world, "LOCAL_WORLD_SIZE": 1, "OMP_NUM_THREADS": 1}.items():
        monkeypatch.setenv(name, str(value))
    try:
        with process_group("cpu", 60) as ranks:
            yield ranks
    finally:
        forget_accelerate()


def forget_accelerate() -> None:
    """Accelerate keeps its state for the life of a process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


class Recorder:
    """A tracker that keeps what it is shown."""

    def __init__(self) -> None:
        self.lines: dict[int, dict[str, float]] = {}
        self.shown: list[str] = []
        self.events: list[dict[str, Any]] = []

    def figures(self, step: int, figures: Mapping[str, float], *, rate: float | None = None) -> None:
        self.lines[step] = dict(figures)

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        self.lines.setdefault(step, {}).update(figures)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        assert image.dtype == np.uint8
        assert image.ndim == 3
        self.shown.append(name)

    def event(self, kind: str, step: int, **facts: Any) -> None:
        self.events.append({"event": kind, "step": step, **facts})

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self.shown.append(name)

    def embedding(self, step: int, name: str, vectors: np.ndarray, labels: list[list[str]], columns: list[str]) -> None:
        assert len(vectors) == len(labels)
        self.shown.append(name)

    def curve(self, name: str) -> list[float]:
        return [figures[name] for _, figures in sorted(self.lines.items())]


def _never() -> None:
    raise AssertionError("nothing hangs")


class Experiment:
    """A task of a recipe with its loader, on this rank.

    Args:
        ranks: this rank.
        recipe: the settings.
        task: over an engine with fresh weights.
        source: the training shards.
        counts: samples of each shard.
    """

    def __init__(self, ranks: Ranks, recipe: Recipe, task: Task, source: Source, counts: list[int]) -> None:
        self.ranks, self.recipe, self.task, self.source, self.counts = ranks, recipe, task, source, counts
        self.engine: Engine = task.engine
        self.recorder = Recorder()

    def loader(self, start: int = 0) -> Loader:
        data = self.recipe.data
        order = StreamOrder(
            self.counts, seed=self.recipe.seed, streams=data.streams, packet=data.packet, shuffle=data.shuffle
        )
        return Loader(
            self.source,
            order,
            rank=self.ranks.rank,
            world=self.ranks.world,
            global_batch=self.engine.training.global_batch,
            start_step=start,
            error_budget=1.0,  # as in the stages: judged by `watch`
        )

    def batches(self, count: int, start: int = 0) -> list[DeviceBatch]:
        """The batches of `count` steps."""
        with self.loader(start) as loader:
            return list(islice(DeviceBatches(loader, self.ranks.device), count))

    def watch(self, folder: Path) -> DataWatch:
        return DataWatch(
            self.ranks, self.recipe.data.error_budget, Quarantine(folder / "quarantine.jsonl"), self.source.store
        )

    def checkpoints(self, folder: Path, faults: Faults = NO_FAULTS) -> Checkpoints:
        return Checkpoints(self.engine, folder, self.ranks.device, seed=self.recipe.seed, faults=faults)

    def run(self, folder: Path, *, faults: Faults = NO_FAULTS, tracked: bool = True) -> dict[str, float]:
        """Resume from `folder` and train to the end."""
        checkpoints = self.checkpoints(folder, faults)
        start, _ = checkpoints.resume(self.task)
        watchdog = Watchdog(folder, self.ranks.rank, 3600, end=_never)
        with checkpoints, self.loader(start) as loader, vigil(self.ranks, watchdog, faults) as watching:
            loop = Loop(
                *(self.task, self.engine.training, DeviceBatches(loader, self.ranks.device)),
                checkpoints=checkpoints,
                watch=self.watch(folder),
                vigil=watching,
                tracker=self.recorder if self.ranks.first and tracked else None,  # type: ignore[arg-type]
                seed=self.recipe.seed,
            )
            return loop.run(start)

    def state(self) -> State:
        """Weights, codebooks and the optimizer's tensors, in the order of their elements."""
        tensors = assemble(self.engine.pieces(), self.ranks)
        return {name.removeprefix("model/"): value.numpy().copy() for name, value in tensors}


def tokenizer_experiment(ranks: Ranks, run: Path, recipe: Recipe, weights: int = 0) -> Experiment:
    """The recipe's tokenizer over the shards of `run`; `weights` seeds the fresh network."""
    forget_accelerate()
    layout, size = RunLayout(run), recipe.data.image_size
    train_url, held_out_url = (layout.shards(recipe, split) for split in ("train", "validation"))
    manifest, held_out = read_manifest(train_url), read_manifest(held_out_url)
    held_out_source = ImageSource(open_shards(held_out_url), size)

    def read_held_out(rank: int = ranks.rank, world: int = ranks.world) -> Iterator[np.ndarray]:
        for batch in EvaluationReader(held_out_source, held_out.counts, rank, world, recipe.evaluate.batch):
            yield batch.fields["image"]

    torch.manual_seed(weights)
    task = tokenizer_task(recipe, ranks, read_held_out, next(read_held_out(0, 1))[:4])
    return Experiment(ranks, recipe, task, ImageSource(open_shards(train_url), size), manifest.counts)


def prior_experiment(ranks: Ranks, codes: Path, recipe: Recipe, weights: int = 0) -> Experiment:
    """The recipe's prior over code shards."""
    forget_accelerate()
    manifest = read_manifest(codes)
    source = CodeSource(open_shards(str(codes)))

    def read_held_out() -> Iterator[dict[str, torch.Tensor]]:
        for batch in EvaluationReader(source, manifest.counts, ranks.rank, ranks.world, recipe.evaluate.batch):
            yield tensors(batch.fields, ranks.device)

    torch.manual_seed(weights)
    network = build_prior(recipe.prior, grid_shapes(recipe.levels), len(manifest.classes))
    shown = (
        tensors(fields, ranks.device) for n in range(len(manifest.counts)) for fields, _ in source.read_shard(n, 8)
    )
    levels = [level.name for level in recipe.levels][::-1]
    show_exemplars(network, shown, levels)
    engine = Engine(network, recipe.prior.training, ranks, recipe.resources.strategy)
    task = PriorTask(engine, recipe.prior, levels, recipe.seed, read_held_out)
    return Experiment(ranks, recipe, task, source, manifest.counts)


class Fixed:
    """An engine of `Checkpoints` with pieces that are given to it."""

    strategy = "ddp"

    def __init__(self, pieces: list[Piece], **training: Any) -> None:
        settings: dict[str, Any] = {"steps": 9, "global_batch": 4, "learning_rate": 1.0, "keep": 9}
        self.training = Training(**(settings | training))
        self._pieces = pieces

    def pieces(self) -> list[Piece]:
        return self._pieces

    def materialise_optimizer(self) -> None:
        pass

    def loaded(self) -> None:
        pass


class Kept:
    """A task of `Checkpoints` that keeps some tensors."""

    def __init__(self, extra: Mapping[str, torch.Tensor] | None = None) -> None:
        self.extra = dict(extra or {})

    def pieces(self) -> list[Piece]:
        return []

    def extra_state(self) -> dict[str, torch.Tensor]:
        return self.extra

    def load_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.extra = dict(state)


def save_network(network: torch.nn.Module, folder: Path, step: int) -> None:
    """A checkpoint of a network alone, as one rank saves it."""
    pieces = [whole(f"model/{name}", value) for name, value in network.state_dict().items()]
    with pytest.MonkeyPatch.context() as patch, one_process(patch) as ranks:
        Checkpoints(Fixed(pieces), folder, ranks.device, seed=0).save(Kept(), step, final=True)


def code_shards(
    folder: Path,
    shards: int = 12,
    samples: int = 20,
    seed: int = 0,
    fingerprint: str = "",
    recipe: Recipe | None = None,
) -> Manifest:
    """Code shards of a recipe's levels (the tiny one's); a sample's latents follow from its class, with some noise."""
    recipe, rng = recipe or tiny_recipe(), np.random.default_rng(seed)
    levels = list(recipe.levels)
    names = []
    for number in range(shards):
        labels = rng.integers(0, 12, samples)
        codes = {level.name: _encoded(level, labels, rng) for level in levels}
        keys = [f"{number}-{i}" for i in range(samples)]
        shard = write_code_shard(f"{folder}/s{number:02d}.tar", [CodeBlock(codes, labels, keys)], levels, fingerprint)
        write_record(str(folder), CodeRecord(shard=shard, fingerprint=fingerprint))
        names.append(shard.name)
    classes = [f"{hour:02d}" for hour in range(12)]
    manifest = manifest_from_records(
        read_records(str(folder), names, fingerprint),
        levels=levels,
        classes=classes,
        image_size=16,
        fingerprint=fingerprint,
        source={},
    )
    write_manifest(folder, manifest)
    return manifest


def _encoded(level: CodeLevel, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Codes near the class, or posteriors whose means lie on a circle by it."""
    if not level.continuous:
        return (labels[:, None, None] + rng.integers(0, 3, (len(labels), level.grid, level.grid))) % level.codes
    shape = (len(labels), level.channels, level.grid, level.grid)
    angles = 2 * np.pi * labels[:, None, None, None] / 12 + np.arange(level.channels)[:, None, None]
    means = 1.5 * np.cos(angles) + 0.2 * rng.standard_normal(shape)
    return np.concatenate([means, np.full(shape, -1.5)], axis=1).astype(np.float32)
