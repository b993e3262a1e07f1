"""A prior on codes that were pulled: no images, no tokenizer, and no mixing of two tokenizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.plan import make_plan
from pipelines import evaluate, sample, train_prior
from pipelines.codes import main as codes
from tests.recipes import tiny_tree, write_recipe
from tests.trained import save_tokenizer
from tests.training_helpers import clock_run, code_shards, one_process, stage_of
from vqscale.checkpoint.folder import open_stored, steps
from vqscale.checkpoint.manifest import CODES_OF
from vqscale.config.inputs import check_inputs
from vqscale.config.load import load_recipe
from vqscale.data.manifest import read_manifest, write_manifest
from vqscale.errors import UserError
from vqscale.loading import load_prior
from vqscale.models.generate import Sampling
from vqscale.training.checkpoints.fitting import require_prior_of


@pytest.fixture
def pulled(tmp_path: Path) -> Path:
    code_shards(tmp_path / "made" / "train", shards=4, fingerprint="abc")
    code_shards(tmp_path / "made" / "validation", shards=1, fingerprint="abc")
    assert codes(["pull", str(tmp_path / "made"), str(tmp_path / "pulled")]) == 0
    return tmp_path / "pulled"


def prior_recipe(path: Path, pulled: Path, **more: Any) -> Path:
    data = tiny_tree()["data"]
    del data["clocks"]
    return write_recipe(path, data=data | {"codes": str(pulled)}, prior__training__steps=4, **more)


def train(run: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with one_process(monkeypatch) as ranks:
        return train_prior.main(stage_of("prior", run, ranks))


def test_the_recipe_has_one_stage_and_is_checked(pulled: Path, tmp_path: Path) -> None:
    path = prior_recipe(tmp_path / "r.yaml", pulled)
    assert load_recipe(path).stages == ("prior",)
    plan = make_plan(str(path), run=tmp_path / "run")
    assert [command.stage for command in plan.commands] == ["prior"]
    assert plan.warnings == ()
    with pytest.raises(
        UserError, match=r"holds bottom 4×4 of 16 codes, top 2×2 of 16 codes, but the recipe has bottom 8×8"
    ):
        check_inputs(load_recipe(path, ["data.image_size=32"]))
    with pytest.raises(UserError, match="4 shards cannot feed 8 streams"):
        check_inputs(load_recipe(path, ["data.streams=8"]))
    with pytest.raises(UserError, match="has both `codes` and images"):
        load_recipe(path, ["data.train=a"])
    with pytest.raises(UserError, match="no such folder"):
        check_inputs(load_recipe(path, [f"data.codes={tmp_path}/none"]))


def test_splits_of_two_tokenizers_are_refused(pulled: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    codes(["pull", str(pulled / "train"), str(other / "train")])
    code_shards(other / "validation", shards=1, fingerprint="another")
    with pytest.raises(UserError, match="has another tokenizer or other classes than"):
        check_inputs(load_recipe(prior_recipe(tmp_path / "r.yaml", other)))


def test_it_trains_without_a_tokenizer_and_remembers_whose_codes(
    pulled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    prior_recipe(run / "recipe.yaml", pulled)
    figures = train(run, monkeypatch)
    assert figures["steps"] == 4
    assert figures["nats_per_code"] > 0
    folder = run / "checkpoints" / "prior"
    assert open_stored(folder, steps(folder)[0]).manifest.made_by[CODES_OF] == "abc"
    require_prior_of("abc", str(folder))
    with pytest.raises(UserError, match="was trained on codes of another tokenizer; train the prior"):
        require_prior_of("another", str(folder))
    for split, shards in (("train", 4), ("validation", 1)):
        code_shards(tmp_path / "new" / split, shards=shards, fingerprint="another")
    prior_recipe(run / "recipe.yaml", tmp_path / "new")
    with pytest.raises(UserError, match="was trained on codes of another tokenizer; resume with"):
        train(run, monkeypatch)


def test_a_prior_without_weights_goes_through_the_stage(
    pulled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    prior_recipe(run / "recipe.yaml", pulled, prior__networks=[{"kind": "uniform"}])
    for _ in range(2):  # killed behind the checkpoint, it starts again
        figures = train(run, monkeypatch)
        assert (figures["steps"], figures["parameters"]) == (0, 0)
        assert figures["nats_per_code"] == pytest.approx(math.log(16))
        assert figures["bits_per_sample"] == pytest.approx(4 * (4 + 16))
        assert steps(run / "checkpoints" / "prior") == [0]
    prior = load_prior(run)
    assert [grid.shape for grid in prior.generate(torch.tensor([0, 3]), [1, 2], Sampling())] == [(2, 2, 2), (2, 4, 4)]


def test_sampling_and_evaluating_with_another_tokenizer_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = clock_run(tmp_path / "run", prior__training__steps=4)
    save_tokenizer(run, 0)
    for split in ("train", "validation"):
        code_shards(run / "codes" / split, shards=4)
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    prior_recipe(recipe, run / "codes")
    train(run, monkeypatch)
    recipe.write_text(text)
    for stage, main in (("sample", sample.main), ("evaluate", evaluate.main)):
        with pytest.raises(UserError, match="was trained on codes of another tokenizer"):
            main(stage_of(stage, run))


def test_a_manifest_that_lies_about_the_tokenizer_stops_the_prior(
    pulled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "validation"):
        manifest = read_manifest(pulled / split)
        write_manifest(pulled / split, manifest.model_copy(update={"fingerprint": "another"}))
    run = tmp_path / "run"
    run.mkdir()
    prior_recipe(run / "recipe.yaml", pulled)
    with pytest.raises(UserError, match="holds codes of another tokenizer than its manifest says"):
        train(run, monkeypatch)
