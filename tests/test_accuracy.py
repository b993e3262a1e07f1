"""Classification accuracy score: what it learns, that it is the same on any number of ranks, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import sample
from pipelines.classifying import classifier_images, measure_classifiers
from tests.ranks import run_ranks
from tests.trained import copy_of, trained_run
from tests.training_helpers import OneRank, stage_of, whole_stage
from vqscale.config.classifier import Classifier as Settings
from vqscale.errors import UserError
from vqscale.evaluation.accuracy import Share, _batch, accuracy, train_classifier
from vqscale.files import read_json, write_json
from vqscale.loading import load_tokenizer
from vqscale.models.classifier import Classifier
from vqscale.training.distributed import process_group

QUICK = Settings(steps=30, global_batch=16, width=8, learning_rate=0.1)


def slanted(count: int, seed: int) -> Share:
    """Stripes in one of four directions, at any place and in any colour."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    angle = labels * np.pi / 4
    y, x = np.mgrid[:16, :16]
    phase = random.uniform(0, 6, count)[:, None, None]
    wave = np.sin((x * np.cos(angle)[:, None, None] + y * np.sin(angle)[:, None, None]) * 1.6 + phase)
    colour = random.uniform(0.3, 1, (count, 1, 1, 3))
    return Share(np.arange(count), (127 * (1 + wave[..., None] * colour)).astype(np.uint8), labels)


def trained_on_ranks(share: Share) -> list[np.ndarray]:
    with process_group("cpu", 60) as ranks:
        mine = slice(ranks.rank, None, ranks.world)
        part = Share(share.numbers[mine], share.images[mine], share.labels[mine])
        settings = QUICK.model_copy(update={"steps": 4})
        network = train_classifier(settings, part, 4, ranks, seed=3, flip=True)
        return [weight.detach().numpy() for weight in network.parameters()]


def test_it_learns_what_tells_the_classes_apart_and_nothing_where_they_are_mixed_up() -> None:
    share, real = slanted(128, 0), slanted(64, 1)
    labels = np.concatenate([real.labels, [-1]])
    held_out = [(np.concatenate([real.images, real.images[:1]]), labels)]
    network = train_classifier(QUICK, share, 4, OneRank(), seed=0, flip=False)
    found = accuracy(network, held_out, 4, OneRank())
    assert found.images == 64, "one has no class"
    assert found.top1 > 0.9
    assert found.top5 is None
    mixed = Share(share.numbers, share.images, np.random.default_rng(2).permutation(share.labels))
    other = train_classifier(QUICK, mixed, 4, OneRank(), seed=0, flip=False)
    assert accuracy(other, held_out, 4, OneRank()).top1 < 0.6


@pytest.mark.dist
def test_the_number_of_ranks_changes_nothing() -> None:
    share = slanted(40, 0)
    (alone,), found = (run_ranks(world, trained_on_ranks, share) for world in (1, 2))
    start = Classifier(4, 16, QUICK.width)
    assert len(alone) == len(list(start.parameters()))
    for each in found:
        for weight, expected in zip(each, alone, strict=True):
            np.testing.assert_allclose(weight, expected, atol=2e-5)


def test_every_pass_takes_all_images() -> None:
    taken = np.concatenate([_batch(10, 4, step, seed=0) for step in range(10)])
    for start in range(0, 40, 10):
        assert sorted(taken[start : start + 10]) == list(range(10))
    assert taken[:10].tolist() != taken[10:20].tolist()
    assert len(_batch(3, 8, 1, seed=0)) == 8, "a batch of several passes"


def test_images_of_all_sizes() -> None:
    for size in (16, 48, 64, 200):
        assert Classifier(3, size, width=8)(torch.zeros(2, 3, size, size)).shape == (2, 3)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = trained_run(tmp_path_factory.mktemp("accuracy") / "run")
    whole_stage(sample, stage_of("sample", run))
    return run


def measured(run: Path, **settings: Any) -> dict[str, Any]:
    wanted = Settings(**{"steps": 2, "global_batch": 8, "width": 8, **settings})
    return measure_classifiers(stage_of("evaluate", run), wanted, load_tokenizer(run), lambda count: None)


def test_all_sets_have_as_many_images_as_the_smallest(drawn: Path) -> None:
    found = measured(drawn)
    assert {found[f"cas_{name}_images"] for name in ("samples", "reconstructions", "images")} == {24}
    assert found["cas_held_out_images"] == 16
    assert all(0 <= found[f"cas_{name}"] <= found[f"cas_{name}_top5"] <= 1 for name in ("samples", "images"))
    assert measured(drawn, sets=("images",))["cas_images_images"] == 64
    assert measured(drawn, images=20)["cas_samples_images"] == 20


def test_without_a_prior_there_are_no_samples(drawn: Path, tmp_path: Path) -> None:
    run = copy_of(drawn, tmp_path / "run", evaluate={"classifier": {"steps": 3, "global_batch": 8}})
    stage = stage_of("evaluate", run)
    assert classifier_images(stage) == 3 * 3 * 8
    (run / "samples" / "samples.json").unlink()
    assert classifier_images(stage) == 2 * 3 * 8
    assert not [name for name in measured(run, sets=("samples", "images")) if "samples" in name]


def test_images_without_classes_are_refused(drawn: Path, tmp_path: Path) -> None:
    run = copy_of(drawn, tmp_path / "run")
    for path in (run / "shards").glob("*/manifest.json"):
        write_json(path, {**read_json(path), "classes": []})
    with pytest.raises(UserError, match="the images have no classes; leave it null"):
        measured(run)
