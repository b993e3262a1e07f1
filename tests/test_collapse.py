"""The known failure of the hierarchy: a healthy bottom below a top that uses few codes. What prevents it, and warns.

A small problem that fails within seconds: clock faces of 16 pixels, 64 codes a level, trained fast. One draw of the
weights proves little, so everything is asked of several.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes import tiny_recipe
from tests.training_helpers import Experiment, clock_run, one_process, tokenizer_experiment
from vqscale.models.quantizer import LevelFigures
from vqscale.training import tokenizer_task
from vqscale.training.distributed import Ranks

CODES, STEPS, SEEDS = 64, 100, (0, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clock_run(tmp_path_factory.mktemp("collapse") / "run")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    with one_process(monkeypatch) as ranks:
        yield ranks


def make(ranks: Ranks, run: Path, weights: int, **quantizer: Any) -> Experiment:
    training = {"steps": STEPS, "learning_rate": 5e-3, "global_batch": 16, "log_every": 50}
    quiet = dict.fromkeys(("validate_every", "picture_every", "checkpoint_every", "hash_every"), 999)
    settings = {f"tokenizer__training__{key}": value for key, value in (training | quiet).items()}
    levels = [{"name": name, "downsample": 2, "codes": CODES, "dim": 16} for name in ("bottom", "top")]
    recipe = tiny_recipe(
        tokenizer__levels=levels, tokenizer__quantizer={"restart_below": 0.1, "window": 30} | quantizer, **settings
    )
    return tokenizer_experiment(ranks, run, recipe, weights)


def last_lines(ranks: Ranks, run: Path, folder: Path, **quantizer: Any) -> list[dict[str, float]]:
    """The last figures of a training from each seed."""
    lines = []
    for weights in SEEDS:
        made = make(ranks, run, weights, **quantizer)
        made.run(folder / str(weights))
        lines.append(made.recorder.lines[STEPS])
    return lines


def top(lines: list[dict[str, float]]) -> list[float]:
    """Share of the top's codes that a batch uses, by its perplexity."""
    return [line["top/batch_perplexity"] / CODES for line in lines]


def test_the_defaults_keep_every_level_in_use(alone: Ranks, run: Path, tmp_path: Path) -> None:
    lines = last_lines(alone, run, tmp_path)
    assert min(top(lines)) > 0.25
    assert all(min(line["top/used"], line["bottom/used"]) > 0.9 for line in lines)


def test_without_restarts_the_top_collapses(alone: Ranks, run: Path, tmp_path: Path) -> None:
    lines = last_lines(alone, run, tmp_path, restarts=False)
    assert max(top(lines)) < 0.25
    assert all(line["bottom/used"] > 0.5 for line in lines)


def test_without_the_warm_up_of_the_decay_restarts_come_too_late(
    alone: Ranks, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code that is never used counts as dead after ln 0.1 / ln 0.99 = 229 steps; until then the top is lost."""
    update = tokenizer_task.update_codebooks
    monkeypatch.setattr(tokenizer_task, "update_codebooks", lambda *given: update(*given[:3], None, given[4]))
    assert max(top(last_lines(alone, run, tmp_path))) < 0.25


def test_the_commitment_is_weakened_in_proportion_to_the_use(
    alone: Ranks, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = tokenizer_task.update_codebooks
    updates: list[list[LevelFigures]] = []

    def noted(*given: Any) -> list[LevelFigures]:
        updates.append(update(*given))
        return updates[-1]

    monkeypatch.setattr(tokenizer_task, "update_codebooks", noted)
    made = make(alone, run, 0, commitment=0.25, relief_below=0.5)
    task, batch = made.task, made.batches(1)[0]
    task.before_step(batch)
    for first, weights in ((True, [0.25, 0.25]), (False, [0.25, 0.25 * 4 / (0.5 * CODES)])):
        if not first:  # as if the last batch had used all codes of the bottom, and four of the top
            task._window._latest["bottom"].fill_(0.9)  # type: ignore[attr-defined]
            task._window._latest["top"].fill_(4 / CODES)  # type: ignore[attr-defined]
        losses = task.losses(batch)
        pulls = [losses[f"commitment_{name}"] for name in ("bottom", "top")]
        expected = losses["reconstruction"] + sum(w * pull for w, pull in zip(weights, pulls, strict=True))
        torch.testing.assert_close(losses["total"], expected)
    task.after_step()
    shares = [level.perplexity / CODES for level in updates[-1]]
    torch.testing.assert_close(task._window.latest(), shares)  # type: ignore[attr-defined]
    figures = task.figures()
    assert figures["top/commitment_weight"] == pytest.approx(0.25 * min(1.0, float(shares[1]) / 0.5))


def test_a_collapse_is_said_once_with_the_remedies(
    alone: Ranks, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = make(alone, run, 1, restarts=False)
    lost.run(tmp_path / "lost")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step ")]
    assert len(said) == 1  # once, though it goes on
    assert "level 'top' is collapsing: perplexity" in said[0]
    assert list(lost.task.warnings) == ["top"]  # type: ignore[attr-defined]
    kept = make(alone, run, 1)
    kept.run(tmp_path / "kept")
    assert not capsys.readouterr().out
    assert kept.task.warnings == {}  # type: ignore[attr-defined]
