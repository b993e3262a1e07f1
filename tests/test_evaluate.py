"""The stage `evaluate`: likelihoods of held-out images, each counted once, whoever measures them."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn
from torch.nn import functional

from pipelines import evaluate, measuring, reevaluate, sample
from pipelines.held_out import fitted_pixels
from tests.ranks import run_ranks
from tests.trained import copy_of, trained_run
from tests.training_helpers import stage_of, whole_stage
from vqscale.data.image_source import ImageSource
from vqscale.data.shards import open_shards
from vqscale.files import read_json
from vqscale.loading import load_prior, load_tokenizer
from vqscale.training.distributed import process_group

DIMENSIONS = 16 * 16 * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("evaluate") / "run")


def measured(run: Path, ranks: Any = None) -> dict[str, Any]:
    stage = stage_of("evaluate", run, ranks)
    prior = load_prior(run) if (run / "checkpoints" / "prior").exists() else None
    return measuring.measure_held_out(stage, load_tokenizer(run), prior)


def measured_by_ranks(run: Path) -> dict[str, Any]:
    with process_group("cpu", 60) as ranks:
        return measured(run, ranks)


def require_alike(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=rel)), name


@pytest.fixture(scope="module")
def figures(trained: Path) -> dict[str, Any]:
    return measured(trained)


def held_out(run: Path) -> tuple[np.ndarray, np.ndarray]:
    source = ImageSource(open_shards(str(run / "shards" / "validation")), 16)
    parts = [part for n in range(len(source.manifest.shards)) for part, _ in source.read_shard(n, 100)]
    return np.concatenate([p["image"] for p in parts]), np.concatenate([p["label"] for p in parts])


def test_figures_are_those_of_the_images_one_by_one(trained: Path, figures: dict[str, Any]) -> None:
    tokenizer, prior = load_tokenizer(trained), load_prior(trained)
    likelihood = fitted_pixels(stage_of("evaluate", trained), tokenizer)
    bits = []
    by_level: dict[str, list[float]] = {"top": [], "bottom": []}
    for image, label in zip(*held_out(trained), strict=True):
        codes = tokenizer.encode(image[None])
        grids = [torch.from_numpy(codes[name].astype(np.int64)) for name in by_level]
        with torch.no_grad():
            nats = [float(level) for level in prior(grids, torch.tensor([label]))]
        for level, value in zip(by_level.values(), nats, strict=True):
            level.append(value)
        bits.append((sum(nats) + likelihood.nats(image[None], tokenizer.decode_means(codes))[0]) / math.log(2))
    assert len(bits) == figures["held_out_images"] == 16
    assert figures["bits_per_dim"] == pytest.approx(np.mean(bits) / DIMENSIONS, rel=1e-4)
    assert figures["bits_per_dim_error"] == pytest.approx(np.std(bits, ddof=1) / 4 / DIMENSIONS, rel=1e-3)
    assert figures["nats_per_code_bottom"] == pytest.approx(np.mean(by_level["bottom"]) / 16, rel=1e-4)
    assert figures["nats_per_code_top"] == pytest.approx(np.mean(by_level["top"]) / 4, rel=1e-4)
    assert figures["bits_per_dim_codes_uniform"] == pytest.approx((16 + 4) * 4 / DIMENSIONS)
    assert (figures["codes_likelihood"], figures["pixel_likelihood"]) == ("exact", "logistic")
    assert figures["bits_per_dim_is"] == figures["bits_per_dim_best_is"] == "VQ bound"
    assert figures["bits_per_dim_best"] == figures["bits_per_dim"]
    assert figures["bits_per_dim_best_error"] == figures["bits_per_dim_error"]
    assert figures["pixel_scale"] == pytest.approx(likelihood.scale, abs=1e-3)


@pytest.mark.dist
def test_the_number_of_ranks_changes_nothing(trained: Path, figures: dict[str, Any]) -> None:
    for found in run_ranks(2, measured_by_ranks, trained):
        require_alike(found, figures, rel=1e-6)


def test_the_batch_changes_nothing(trained: Path, figures: dict[str, Any], tmp_path: Path) -> None:
    require_alike(measured(copy_of(trained, tmp_path / "run", evaluate={"batch": 3})), figures, rel=1e-4)


def test_the_likelihood_of_pixels_is_chosen(trained: Path, figures: dict[str, Any], tmp_path: Path) -> None:
    found = measured(copy_of(trained, tmp_path / "run", evaluate={"likelihood": "gaussian"}))
    assert found["pixel_likelihood"] == "gaussian"
    assert found["bits_per_dim_pixels"] != figures["bits_per_dim_pixels"]
    assert found["bits_per_dim_codes"] == figures["bits_per_dim_codes"]


def test_without_a_prior_there_is_the_baseline_alone(trained: Path, figures: dict[str, Any], tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "prior")
    found = measured(run)
    assert found["bits_per_dim_uniform"] == figures["bits_per_dim_uniform"]
    assert not {"bits_per_dim", "bits_per_dim_best", "nats_per_code", "codes_likelihood"} & found.keys()


def test_report_and_tensorboard_have_them(trained: Path, figures: dict[str, Any], tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run")
    whole_stage(sample, stage_of("sample", run))
    for name in ("extract", "prior", "tokenizer"):
        done = run / "stages" / name / "done.json"
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text('{"nats_per_code": 99.0, "bits_per_sample_elsewhere": 1.0}')
    returned = evaluate.main(stage_of("evaluate", run))
    report = read_json(run / "report.json")
    assert report["bits_per_dim"] == returned["bits_per_dim"] == pytest.approx(figures["bits_per_dim"], rel=1e-9)
    assert report["nats_per_code"] == pytest.approx(figures["nats_per_code"], rel=1e-9), "measured here, not before"
    events = EventAccumulator(str(run / "tensorboard" / "evaluate"))
    events.Reload()
    assert events.Scalars("report/bits_per_dim")[0].value == pytest.approx(report["bits_per_dim"], rel=1e-6)
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["tokenizer.levels.0.codes"].number_value == 16
    assert settings["prior.networks.0.kind"].string_value == "transformer"


class Features(nn.Module):
    """Twelve features that tell images apart, and four classes."""

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        cells = functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return cells if return_features else (4 * cells[:, :4]).softmax(dim=1)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "features.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Features()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def with_features(trained: Path, network: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = {"features": network, "reference_images": 40, "compared_images": 24}
    run = copy_of(trained, tmp_path_factory.mktemp("features") / "run", evaluate=wanted, sample={"per_class": 3})
    whole_stage(sample, stage_of("sample", run))
    return run


def evaluated(run: Path) -> dict[str, Any]:
    with process_group("cpu", 60) as ranks:
        return evaluate.main(stage_of("evaluate", run, ranks))


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_features_of_samples_and_reconstructions(with_features: Path) -> None:
    for name in ("extract", "prior", "tokenizer"):
        done = with_features / "stages" / name / "done.json"
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text("{}")
    alone = evaluate.main(stage_of("evaluate", with_features))
    report = read_json(with_features / "report.json")
    assert (report["fid_samples"], report["fid_reference"], report["fid_reference_images"]) == (36, "train", 40)
    assert (report["rfid_images"], report["precision_images"]) == (16, 24)
    assert report["fid"] > 0
    assert report["rfid"] > 0
    assert 1 <= report["inception_score"] <= 4
    for found in run_ranks(2, evaluated, with_features):
        require_alike({key: found[key] for key in alone}, alone, rel=1e-4)
    text = (with_features / "report.html").read_text()
    assert all(f"<code>{name}</code>" in text for name in ("psnr", "ssim", "fid", "rfid", "precision", "nats_per_code"))
    assert text.count("<img ") == 2


def test_where_the_bits_of_the_codes_go(figures: dict[str, Any]) -> None:
    parts = [figures[f"code_bits_{part}"] for part in ("unused", "placed", "positions")]
    assert sum(parts) == pytest.approx(figures["code_bits_uniform"]) == 80
    assert figures["code_bits_learned"] == pytest.approx(figures["bits_per_dim_codes"] * DIMENSIONS)
    assert figures["code_bits_mutual_information"] <= 4 + 1e-9, "sixteen images"
    assert 0 < figures["ssim"] < 1
    assert figures["sharpness_images"] == 16
    assert 0 < figures["sharpness_gradient_energy_reconstructions"] < 1
    assert figures["l1"] ** 2 <= figures["mse"]


def test_a_run_is_measured_again(with_features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(with_features), tmp_path / "again"
    words = ["evaluate.features=''", "evaluate.likelihood=gaussian", "--device", "cpu", "--json"]
    assert reevaluate.main([run, "--out", str(out), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == read_json(out / "report.json")
    assert (told["pixel_likelihood"], told["evaluate"]["likelihood"]) == ("gaussian", "gaussian")
    assert "fid" not in told
    assert (out / "report.html").exists()
    for wrong, said in (
        ([str(tmp_path), "--out", run], "is no run directory"),
        ([run, "seed=3"], "'seed=3' is not a setting of evaluate; use evaluate.KEY=VALUE"),
        ([run, "evaluate.batches=3"], "unknown key 'evaluate.batches'"),
        ([run, "evaluate.features=/absent.pt", "--device", "cpu"], "/absent.pt: no such file"),
    ):
        assert reevaluate.main(wrong) == 2
        err = capsys.readouterr().err
        assert said in err.splitlines()[-1]
        assert err.splitlines()[-1].startswith("error: ")
