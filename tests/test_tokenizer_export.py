"""Extraction picks the codes that training and validation pick, all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training_helpers import Experiment, clock_run, one_process, tokenizer_experiment
from vqscale.config.layout import RunLayout
from vqscale.exporting import export_run
from vqscale.loading import TrainedTokenizer, load_tokenizer
from vqscale.models.pixels import from_uint8
from vqscale.models.quantizer import Codebook
from vqscale.training.checkpoints.reader import content_hash, require
from vqscale.training.distributed import Ranks

OFFSET = 5.0
"""Mean of the latents against a spread of about one tenth: there a search in bf16 finds nine codes in ten wrong."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with one_process(monkeypatch) as ranks:
        yield ranks


def train(ranks: Ranks, root: Path, **overrides: Any) -> tuple[Experiment, TrainedTokenizer]:
    """A short training whose latents lie far from the origin, in a run directory; and what is loaded from there."""
    settings = {"tokenizer__training__steps": 6, "data__clocks": {"train": 64, "validation": 47, "shards": 4}}
    run = clock_run(root / "run", **settings | overrides)
    made = tokenizer_experiment(ranks, run, RunLayout(run).read_recipe())
    for convolution in made.engine.bare.before_quantizing:
        convolution.bias.data += OFFSET
    made.run(RunLayout(run).root / "checkpoints" / "tokenizer")
    return made, load_tokenizer(run)


def codes_of_validation(made: Experiment) -> dict[str, np.ndarray]:
    """What the codebooks find while the task validates."""
    names = [level.name for level in made.recipe.tokenizer.levels]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    hooks = [
        book.register_forward_hook(lambda module, given, out, name=name: found[name].append(out.codes.numpy()))
        for name, book in zip(names, made.engine.bare.codebooks, strict=True)
    ]
    made.engine.bare.eval()
    with torch.no_grad():
        made.task.validate()
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}


def held_out(made: Experiment) -> np.ndarray:
    return np.concatenate(list(made.task._held_out()))  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize(
    "quantizer", [{}, {"distance": "cosine"}, {"learning": "gradient"}], ids=["ema", "cosine", "gradient"]
)
def test_extraction_finds_the_codes_of_validation(
    precision: str, average: float, quantizer: dict[str, Any], alone: Ranks, tmp_path: Path
) -> None:
    settings = {"tokenizer__training__precision": precision, "tokenizer__quantizer": quantizer}
    made, loaded = train(alone, tmp_path, **settings, tokenizer__ema_decay=average)
    book, images = made.engine.bare.codebooks[0], held_out(made)
    assert isinstance(book, Codebook)
    if not quantizer:
        assert book.codes.mean() > 0.9 * OFFSET
        assert book.codes.std(dim=0).mean() < 1
    expected = codes_of_validation(made)
    assert len(images) == 47
    for batch in (47, 10, 1):  # validation took 16 at a time
        parts = [loaded.encode(images[start : start + batch]) for start in range(0, len(images), batch)]
        for name, grid in expected.items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), grid), (name, batch)
    assert all(len(np.unique(grid)) > 2 for grid in expected.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_extraction_finds_the_codes_of_a_training_step(precision: str, alone: Ranks, tmp_path: Path) -> None:
    """In training mode, with statistics and through DDP."""
    made, loaded = train(alone, tmp_path, tokenizer__training__precision=precision)
    batch = made.batches(1, start=6)[0]
    made.engine.model.train()
    made.task.before_step(batch)
    with made.engine.autocast():
        output = made.engine.model(from_uint8(batch.fields["image"], torch.device("cpu")), made.task._donors(batch))  # type: ignore[attr-defined]
    for name, level in zip(loaded.levels, output.levels, strict=True):
        assert np.array_equal(loaded.encode(batch.fields["image"].numpy())[name], level.codes.numpy())


def test_the_average_is_loaded_and_named_by_the_fingerprint(alone: Ranks, tmp_path: Path) -> None:
    """The same plain weights and codebooks with three averages, one of which is none."""
    found = {
        average: train(alone, tmp_path / str(average), tokenizer__ema_decay=average)[1] for average in (0.0, 0.1, 0.9)
    }
    weights = [next(loaded.network.parameters()) for loaded in found.values()]
    assert not any(torch.equal(one, other) for one, other in zip(weights, [*weights[1:], weights[0]], strict=True))
    books = [loaded.network.codebooks[0].codes for loaded in found.values()]
    assert torch.equal(books[0], books[1])
    assert torch.equal(books[0], books[2])
    assert len({loaded.fingerprint for loaded in found.values()}) == 3


def test_decoding_gives_the_reconstruction_that_is_validated(alone: Ranks, tmp_path: Path) -> None:
    made, loaded = train(alone, tmp_path)
    images = held_out(made)
    with torch.no_grad():
        error = ((loaded.decode(loaded.encode(images)).astype(np.float64) - images).reshape(len(images), -1) / 255) ** 2
        assert made.task.validate()["mse"] == pytest.approx(error.mean(), rel=1e-2)  # that one is rounded to uint8


def test_the_averaged_weights_are_exported(alone: Ranks, tmp_path: Path) -> None:
    """What validation judged is what encodes; and both of them make the fingerprint."""
    _, loaded = train(alone, tmp_path, tokenizer__ema_decay=0.9)
    recipe = RunLayout(tmp_path / "run").read_recipe()
    checkpoint = require(RunLayout(tmp_path / "run").checkpoints(recipe, "tokenizer"), "tokenizer")
    average = checkpoint.tensors("extra/average.")
    assert {name for name, _ in loaded.network.named_parameters()} == set(average)
    for name, parameter in loaded.network.named_parameters():
        assert torch.equal(parameter, average[name])
    plain = checkpoint.tensors("model/")
    assert not torch.equal(plain["to_pixels.weight"], average["to_pixels.weight"])
    assert torch.equal(loaded.network.codebooks[0].codes, plain["codebooks.0.codes"])
    assert loaded.fingerprint == checkpoint.fingerprint() == content_hash(plain, average)
    assert loaded.fingerprint != content_hash(plain, {})
    export_run(RunLayout(tmp_path / "run"), tmp_path / "exported")
    again = load_tokenizer(tmp_path / "exported")
    for name, parameter in again.network.named_parameters():
        assert torch.equal(parameter, average[name])
    assert again.fingerprint == loaded.fingerprint
