"""The whole pipeline as users run it: launcher, supervisor, torchrun, two processes a stage, one run directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.data_helpers import image_folder
from tests.ranks import torchrun
from tests.recipes import tiny_tree, write_recipe
from vqscale.config.layout import RunLayout
from vqscale.data.clocks import CLASSES
from vqscale.data.manifest import read_manifest
from vqscale.files import read_json
from vqscale.stages import STAGES

HOUSE = Path(__file__).parents[1]
PRIOR_STEPS = 12


def small_recipe() -> dict[str, Any]:
    """Sizes at which a healthy tokenizer uses all of its codes after some seconds."""
    training = {"global_batch": 32, "log_every": 10, "warmup": 10}
    pictures = {"picture_every": 75, "validate_every": 75, "checkpoint_every": 75}
    tree = tiny_tree(
        data__clocks={"train": 960, "validation": 48, "shards": 6},
        data__packet=4,
        data__shuffle=64,
        tokenizer__levels=[
            {"name": "bottom", "downsample": 4, "codes": 64, "dim": 8},
            {"name": "top", "downsample": 2, "codes": 64, "dim": 8},
        ],
        tokenizer__hidden=32,
        tokenizer__residual_hidden=16,
        tokenizer__quantizer={"decay": 0.9, "commitment": 0.1, "restart_below": 0.2},
        tokenizer__training={**training, **pictures, "steps": 150, "learning_rate": 3e-3, "schedule": "cosine"},
        extract={"batch": 64, "block": 64},
        evaluate={"batch": 64},
        resources__processes=2,
    )
    sizes = {"layers": 1, "width": 16, "heads": 2}
    tree["prior"]["networks"] = [sizes, {"kind": "masked", **sizes}]
    tree["prior"]["training"] |= {"global_batch": 8, "steps": PRIOR_STEPS, "log_every": 1, "checkpoint_every": 4}
    return tree


@dataclass
class House:
    """Runs of their own, and the command line."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"VQSCALE_HOME": str(self.root / "home"), "VQSCALE_RUNS": str(self.root / "runs")}

    def vqscale(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", *argv],
            cwd=HOUSE,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    def submit(self, name: str, *overrides: str) -> RunLayout:
        run = self.root / name
        done = self.vqscale("submit", str(self.root / "recipe.yaml"), "--follow", "--run", str(run), *overrides)
        assert done.returncode == 0, done.stdout + done.stderr + self.vqscale("logs", str(run), "--failed").stdout
        return RunLayout(run)


@dataclass
class Finished:
    """A run that went through every stage."""

    house: House
    layout: RunLayout
    wall_s: float


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    house = House(tmp_path_factory.mktemp("end_to_end"))
    (house.root / "recipe.yaml").write_text(yaml.safe_dump(small_recipe(), sort_keys=False))
    began = time.monotonic()
    layout = house.submit("run")
    return Finished(house, layout, time.monotonic() - began)


def markers(layout: RunLayout) -> dict[str, float]:
    return {stage: layout.done(stage).stat().st_mtime for stage in STAGES if layout.done(stage).exists()}


def opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar in TensorBoard's event files, as TensorBoard shows them."""
    found = accumulator(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def accumulator(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


@pytest.mark.dist
def test_all_stages_are_done(finished: Finished) -> None:
    layout = finished.layout
    state = read_json(layout.state)["stages"]
    assert {name: entry["state"] for name, entry in state.items()} == dict.fromkeys(STAGES, "done")
    for stage in STAGES:
        assert read_json(layout.done(stage))["stage"] == stage
        assert not layout.failure(stage).exists()
        logs = sorted((layout.attempt(stage, 1) / "ranks").rglob("stdout.log"))
        assert len(logs) == 2, "one log a rank"
    assert "from step 0" in "".join(path.read_text() for path in (layout.attempt("prior", 1)).rglob("stdout.log"))


@pytest.mark.dist
def test_the_report(finished: Finished) -> None:
    report = read_json(finished.layout.report)
    for level in ("bottom", "top"):
        assert report[f"usage_{level}"] >= 0.9
        assert 16 < report[f"perplexity_{level}"] <= 64
    assert len(report["hour_accuracy_by_hour"]) == 12
    assert report["samples_per_hour"] == 2
    assert report["held_out_images"] == 48
    assert 0 < report["bits_per_dim_codes"] < report["bits_per_dim_codes_uniform"]
    assert report["bits_per_dim_pixels"] < report["bits_per_dim"] < 8
    assert 12 < report["psnr"] < 40
    assert 0 < report["mse"] < report["mse_over_variance"] < 1
    assert report["bits_per_sample"] == pytest.approx(report["nats_per_code"] * 20 / np.log(2))
    assert set(report["seconds"]) == set(STAGES)
    assert all(0 < seconds < finished.wall_s for seconds in report["seconds"].values())
    tokenizer = read_json(finished.layout.done("tokenizer"))
    assert tokenizer["psnr"] == pytest.approx(report["psnr"], abs=0.1)
    assert (tokenizer["steps"], tokenizer["bad_samples"]) == (150, 0)


@pytest.mark.dist
def test_data_and_codes_belong_together(finished: Finished) -> None:
    layout = finished.layout
    for split, count in (("train", 960), ("validation", 48)):
        images, codes = read_manifest(layout.root / "shards" / split), read_manifest(layout.codes(split))
        assert (images.samples, codes.samples) == (count, count)
        assert images.classes == codes.classes == CLASSES
        assert [level.grid for level in codes.levels] == [4, 2]
    from vqscale.loading import load_tokenizer

    assert load_tokenizer(layout.root).fingerprint == read_manifest(layout.codes("train")).fingerprint


@pytest.mark.dist
def test_samples_and_sheets_open(finished: Finished) -> None:
    samples = finished.layout.samples
    record = read_json(samples / "samples.json")
    assert record["labels"] == [n % 12 for n in range(24)]
    for label, name in zip(record["labels"], record["files"], strict=True):
        assert opened(samples / name).shape == (16, 16, 3)
        assert Path(name).parent.name == CLASSES[label]
    sheet = opened(samples / "sheet.png")
    assert sheet.shape[0] > 12 * 64
    assert sheet.std() > 10
    rows = 2 + 2 * 2  # inputs and reconstructions; what each level carries alone, and its codes
    assert opened(samples / "reconstructions.png").shape[0] == rows * 68 + 4


@pytest.mark.dist
def test_tensorboard_has_what_is_promised(finished: Finished) -> None:
    layout = finished.layout
    found = scalars(layout.tensorboard / "tokenizer")
    expected = {"loss/total", "loss/reconstruction", "loss/commitment_bottom", "loss/commitment_top"}
    expected |= {f"{level}/{name}" for level in ("bottom", "top") for name in ("perplexity", "used", "restarted")}
    expected |= {"optim/learning_rate", "optim/gradient_norm"}
    expected |= {"speed/images_per_second", "speed/tokens_per_second", "speed/data_wait", "data/bad_samples"}
    assert expected <= found.keys()
    assert {"validation/psnr", "validation/mse"} <= found.keys()
    assert [step for step, _ in found["loss/total"]] == [1, *range(10, 151, 10)]
    assert found["loss/total"][-1][1] < 0.7 * found["loss/total"][0][1]
    assert sum(value for _, value in found["bottom/restarted"]) > 0
    assert all(0 <= value <= 1 for _, value in found["speed/data_wait"])
    events = accumulator(layout.tensorboard / "tokenizer")
    assert set(events.Tags()["images"]) == {
        *("images/input_and_reconstruction", "images/levels", "codes/bottom", "codes/top")
    }
    assert [event.step for event in events.Images("codes/top")] == [1, 75, 150]
    assert "recipe/text_summary" in events.Tags()["tensors"]
    prior = accumulator(layout.tensorboard / "prior")
    assert "samples" in prior.Tags()["images"]
    expected = {"loss/total", "loss/top", "loss/bottom", "validation/bits_per_sample"}
    expected |= {"speed/images_per_second", "speed/tokens_per_second"}
    assert expected <= set(prior.Tags()["scalars"])


@pytest.mark.dist
def test_status_and_logs_know_it(finished: Finished) -> None:
    run = str(finished.layout.root)
    assert "done" in finished.house.vqscale("status", run).stdout
    assert finished.house.vqscale("status", run, "--json").returncode == 0
    assert "parameters" in finished.house.vqscale("logs", run, "--stage", "tokenizer").stdout


@pytest.mark.dist
def test_requeue_of_a_finished_run_does_nothing(finished: Finished) -> None:
    before = markers(finished.layout)
    again = finished.house.vqscale("requeue", str(finished.layout.root), "--follow")
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "is done" in again.stderr
    assert markers(finished.layout) == before


@pytest.mark.dist
@pytest.mark.fault
def test_a_stage_that_lost_its_end_goes_on_from_its_checkpoint(finished: Finished) -> None:
    """As if the prior had been killed behind step 8: the same weights, and no step twice in TensorBoard."""
    layout, folder = finished.layout, finished.layout.root / "checkpoints" / "prior"
    before, curves, marker = markers(layout), scalars(layout.tensorboard / "prior"), read_json(layout.done("prior"))
    last = folder / f"step-{PRIOR_STEPS:08d}"
    content = {path.name: path.read_bytes() for path in last.iterdir()}
    shutil.rmtree(last)
    layout.done("prior").unlink()
    again = finished.house.vqscale("requeue", str(layout.root), "--follow")
    assert again.returncode == 0, again.stdout + again.stderr
    after = markers(layout)
    assert {stage for stage in STAGES if after[stage] != before[stage]} == {"prior"}
    assert read_json(layout.done("prior"))["attempt"] == 2
    assert {path.name: path.read_bytes() for path in last.iterdir()} == content
    assert read_json(layout.done("prior"))["nats_per_code"] == marker["nats_per_code"]
    resumed = scalars(layout.tensorboard / "prior")
    for tag in ("loss/total", "loss/top", "optim/gradient_norm", "optim/learning_rate", "validation/nats_per_code"):
        assert resumed[tag] == curves[tag], tag
    assert [step for step, _ in resumed["loss/total"]] == list(range(1, PRIOR_STEPS + 1))
    events = accumulator(layout.tensorboard / "prior")
    assert len(events.Tensors("recipe/text_summary")) == 1
    assert len(list((layout.tensorboard / "prior").iterdir())) == 2


@pytest.mark.dist
def test_a_stage_under_plain_torchrun(finished: Finished) -> None:
    layout = finished.layout
    before = read_json(layout.report)
    layout.report.unlink()
    torchrun(2, "-m", "pipelines.evaluate", "--run-dir", str(layout.root))
    after = read_json(layout.report)
    for report in (before, after):
        del report["seconds"]
    assert after == before


@pytest.mark.dist
def test_the_figures_show_a_collapse(finished: Finished) -> None:
    """The same images, seed and steps with restarts off and random codes: the report must say so."""
    shards = [f"data.{split}={finished.layout.root / 'shards' / split}" for split in ("train", "validation")]
    switches = ["tokenizer.quantizer.restarts=false", "tokenizer.quantizer.init=random"]
    stages = ["--stages", "tokenizer,extract,evaluate"]
    layout = finished.house.submit("collapsed", *stages, "data.clocks=null", *shards, *switches)
    healthy, collapsed = read_json(finished.layout.report), read_json(layout.report)
    for level in ("bottom", "top"):
        assert collapsed[f"usage_{level}"] <= 0.25
        assert collapsed[f"usage_{level}"] < healthy[f"usage_{level}"] / 3
        assert collapsed[f"perplexity_{level}"] < healthy[f"perplexity_{level}"] / 3
    assert "hour_accuracy" not in collapsed
    assert set(collapsed["seconds"]) == {"tokenizer", "extract", "evaluate"}


def left_behind(environment: Mapping[str, str]) -> list[str]:
    """Command lines of processes that carry this environment's run folder."""
    mark, found = f"VQSCALE_RUNS={environment['VQSCALE_RUNS']}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(path.with_name("cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def refused(house: House, *argv: str) -> str:
    """The one line on standard error; exit code 2, nothing made, nothing started."""
    done = house.vqscale(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (house.root / "runs").exists()
    assert left_behind(house.environment) == []
    return done.stderr


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"tokenizer__hiden": 3}, "unknown key 'tokenizer.hiden'; did you mean 'tokenizer.hidden'?"),
        ({"tokenizer__training__steps": "many"}, "'tokenizer.training.steps' is 'many' (a str); input should be"),
        ({"data__image_size": 18}, "data.image_size 18 is not divisible by 8"),
    ],
)
def test_faulty_recipes_are_refused(setting: dict[str, Any], expected: str, house: House) -> None:
    path = write_recipe(house.root / "r.yaml", **setting)
    assert expected in refused(house, "submit", str(path), "--follow")


def shard_recipe(house: House) -> Path:
    train, validation = str(house.root / "shards/train"), str(house.root / "shards/validation")
    return write_recipe(house.root / "r.yaml", data__clocks=None, data__train=train, data__validation=validation)


def test_a_missing_shard_is_refused(house: House) -> None:
    image_folder(house.root / "images", classes=3, each=20)
    shards = str(house.root / "shards")
    packed = house.vqscale(
        "data", "pack", str(house.root / "images"), shards, "--size", "16", "--holdout", "12", "--shard-samples", "12"
    )
    assert packed.returncode == 0, packed.stderr
    lost = sorted((house.root / "shards/train").glob("*.tar"))[1]
    lost.unlink()
    line = refused(house, "submit", str(shard_recipe(house)), "--follow")
    assert f"{lost}: shard is missing; copy it again" in line


def test_an_empty_folder_is_refused(house: House) -> None:
    for split in ("train", "validation"):
        (house.root / "shards" / split).mkdir(parents=True)
    line = refused(house, "submit", str(shard_recipe(house)), "--follow")
    assert "shards/train: is an empty folder; write shards with `vqscale data pack" in line
    (house.root / "nothing").mkdir()
    line = refused(house, "data", "pack", str(house.root / "nothing"), str(house.root / "out"), "--size", "16")
    assert "nothing" in line
    assert not (house.root / "out").exists()
