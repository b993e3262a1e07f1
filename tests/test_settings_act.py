"""No setting of the tokenizer is without a test that it acts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from tests import test_tokenizer_task, test_training_settings
from vqscale.config.vqvae2 import VQVAE2

SHORT = {"q__": "quantizer.", "l__": "losses.", "t__": "training."}
ELSEWHERE = {
    "kind": "test_pixels.py::test_settings_of_other_kinds_are_refused",
    "levels.name": "test_end_to_end.py::test_the_report",
    "levels.downsample": "test_tokenizer_task.py::test_settings_reach_the_codebook_of_every_level",
    "levels.codes": "test_tokenizer_task.py::test_settings_reach_the_codebook_of_every_level",
    "levels.dim": "test_tokenizer_task.py::test_settings_reach_the_codebook_of_every_level",
    "hidden": "test_recipes_paper.py::test_layers_of_sonnets_example",
    "residual_blocks": "test_recipes_paper.py::test_layers_of_sonnets_example",
    "residual_hidden": "test_recipes_paper.py::test_layers_of_sonnets_example",
    "quantizer.window": "test_tokenizer_task.py::test_the_window_is_as_long_as_said",
    "quantizer.collapse_below": "test_tokenizer_task.py::test_no_warning_where_none_is_wanted",
    "losses.perceptual.weights": "test_tokenizer_task.py::test_the_perceptual_term_acts",
    "losses.perceptual.weight": "test_tokenizer_task.py::test_the_perceptual_term_acts",
    "ema_decay": "test_tokenizer_task.py::test_the_average_is_judged_and_the_weights_are_trained",
    "training.steps": "test_training_ranks.py::test_the_training_is_worth_comparing",
    "training.optimizer": "test_prior_ranks.py::test_ranks_hold_the_same_and_a_resumed_prior_is_bit_identical",
    "training.final_learning_rate": "test_training_settings.py::test_final_learning_rate_acts",
    "training.keep": "test_checkpoint.py::test_retention",
    "training.checkpoint_async": "test_checkpoint.py::test_a_save_in_the_background_equals_a_blocking_one",
    "training.micro_batch": "test_engine.py::test_micro_batches_are_one_batch",
    "training.checkpoint_activations": "test_engine.py::test_recomputed_activations_change_nothing",
    "training.compile": "test_engine.py::test_compiled_blocks_train_as_eager_ones",
    "training.max_skipped": "test_engine_settings.py::test_a_run_that_only_skips_stops",
    "training.hash_every": "test_training_ranks.py::test_a_rank_that_differs_stops_the_run",
}
"""Tests of what no change of weights can show, or of what needs another set-up."""
REPORTS = {f"training.{what}_every" for what in ("log", "picture", "validate", "checkpoint")}
"""How often something is done: `test_end_to_end.py::test_tensorboard_has_what_is_promised` finds all of it."""


def sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections inside a type, such as `tuple[Level, ...]` or `Perceptual | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections(inner)


def settings(section: type[BaseModel], before: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = list(sections(field.annotation))
        for part in inner:
            yield from settings(part, f"{before}{name}.")
        if not inner:
            yield f"{before}{name}"


def changed(given: dict[str, Any], before: str = "") -> Iterator[str]:
    """Settings that stand in the parameters of a test, by the names they have in the recipe."""
    for key, value in given.items():
        long = next((SHORT[short] + key.removeprefix(short) for short in SHORT if key.startswith(short)), key)
        name = before + re.sub(r"levels\.\d+", "levels", long.replace("__", ".").removeprefix("tokenizer."))
        yield name
        if isinstance(value, dict):
            yield from changed(value, f"{name}.")


def test_every_setting_of_the_tokenizer_is_seen_to_act() -> None:
    seen = set(ELSEWHERE) | REPORTS
    for key, _ in test_training_settings.test_every_setting_acts.pytestmark[0].args[1]:  # type: ignore[attr-defined]
        seen |= set(changed({key: None}))
    for _, change in test_tokenizer_task.test_every_setting_acts.pytestmark[0].args[1]:  # type: ignore[attr-defined]
        seen |= set(changed(change))
    assert set(settings(VQVAE2)) - seen == set()


def test_the_tests_that_are_named_exist() -> None:
    for named in ELSEWHERE.values():
        file, _, name = named.partition("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(), named
    assert set(settings(VQVAE2)) >= set(ELSEWHERE) | REPORTS
