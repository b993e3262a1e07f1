"""The stage `sample`: an image follows from seed, number and class, whoever draws it, however often it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import measuring, sample
from tests.ranks import run_ranks
from tests.trained import copy_of, save_prior, trained_run
from tests.training_helpers import end_task, stage_of, task_of, whole_stage
from vqscale.config.layout import RunLayout
from vqscale.data.drawn import open_drawn
from vqscale.data.images import decode
from vqscale.errors import UserError
from vqscale.events import newest
from vqscale.files import read_json
from vqscale.training.distributed import process_group

SAMPLE = {"per_class": 3, "batch": 64, "guidance": 1.5, "seed": 5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("sample") / "run")


def draw(run: Path) -> dict[str, Any]:
    """One rank of the stage."""
    with process_group("cpu", 60) as ranks:
        return whole_stage(sample, stage_of("sample", run, ranks))


def all_of(run: Path) -> np.ndarray:
    drawn = open_drawn(run / "samples")
    return drawn.read(range(len(drawn.labels)))


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = copy_of(trained, tmp_path_factory.mktemp("alone") / "run", sample=SAMPLE)
    assert whole_stage(sample, stage_of("sample", run))["samples"] == 36
    return run


def test_files_labels_and_sheet(alone: Path) -> None:
    record = read_json(alone / "samples" / "samples.json")
    assert record["labels"] == [n % 12 for n in range(36)]
    assert record["files"][13] == "01/000013.png"
    images = all_of(alone)
    assert np.array_equal(decode((alone / "samples" / "01" / "000013.png").read_bytes(), 16), images[13])
    assert len(np.unique(images.reshape(36, -1), axis=0)) > 30
    assert decode((alone / "samples" / "sheet.png").read_bytes(), 64).std() > 5
    event = newest(RunLayout(alone).events("sample"), "").get("")
    assert event is not None
    assert event["step"] == event["total"] == 36
    assert event["rate"] > 0


@pytest.mark.parametrize("batch", [1, 7])
def test_the_batch_changes_nothing(alone: Path, trained: Path, batch: int, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run", sample=SAMPLE | {"batch": batch})
    whole_stage(sample, stage_of("sample", run))
    assert np.array_equal(all_of(run), all_of(alone))
    assert read_json(run / "samples" / "samples.json") == read_json(alone / "samples" / "samples.json")


@pytest.mark.dist
def test_the_number_of_ranks_changes_nothing(alone: Path, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run", sample=SAMPLE)
    run_ranks(3, draw, run)
    assert np.array_equal(all_of(run), all_of(alone))


@pytest.mark.parametrize("output", ["png", "webdataset", "npz"])
def test_tasks_change_nothing(alone: Path, trained: Path, output: str, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run", sample=SAMPLE | {"output": output})
    for task in (2, 0, 1):
        assert not RunLayout(run).done("sample").exists()
        stage = task_of("sample", run, task, 3)
        end_task(stage, sample.finish, {"stage": "sample", "attempt": 1, "seconds": 1.0, **sample.main(stage)})
    assert np.array_equal(all_of(run), all_of(alone))
    assert read_json(RunLayout(run).done("sample"))["samples"] == 36


@pytest.mark.parametrize("output", ["webdataset", "npz"])
def test_the_output_changes_nothing(alone: Path, trained: Path, output: str, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run", sample=SAMPLE | {"output": output, "batch": 10})
    whole_stage(sample, stage_of("sample", run))
    assert np.array_equal(all_of(run), all_of(alone))
    figures = measuring.measure_hours(stage_of("evaluate", run), open_drawn(run / "samples"))
    assert figures == measuring.measure_hours(stage_of("evaluate", alone), open_drawn(alone / "samples"))
    assert figures["samples_per_hour"] == 3


@pytest.mark.fault
def test_a_killed_drawing_goes_on(alone: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy_of(trained, tmp_path / "run", sample=SAMPLE | {"batch": 8})
    drawing, calls = sample.draw_images, []

    def die(*arguments: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments[4])
        return drawing(*arguments)

    monkeypatch.setattr(sample, "draw_images", die)
    with pytest.raises(KeyboardInterrupt):
        whole_stage(sample, stage_of("sample", run))
    with pytest.raises(UserError, match=r"has no samples\.json"):
        open_drawn(run / "samples")
    monkeypatch.setattr(sample, "draw_images", lambda *given: calls.append(given[4]) or drawing(*given))
    whole_stage(sample, stage_of("sample", run))
    assert [n for numbers in calls for n in numbers] == list(range(36)), "nothing was drawn twice"
    assert np.array_equal(all_of(run), all_of(alone))
    whole_stage(sample, stage_of("sample", run))
    assert sum(map(len, calls)) == 36, "what is finished is left alone"
    save_prior(run, seed=1, step=16)
    whole_stage(sample, stage_of("sample", run))
    assert sum(map(len, calls)) == 72, "another prior draws other images"
    assert not np.array_equal(all_of(run), all_of(alone))


def test_chosen_classes_and_count(alone: Path, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run", sample=SAMPLE | {"classes": ["03", 7], "count": 5})
    assert whole_stage(sample, stage_of("sample", run))["samples"] == 5
    assert open_drawn(run / "samples").labels == (3, 7, 3, 7, 3)
    assert not np.array_equal(all_of(run)[0], all_of(alone)[0]), "image 0 is of another class"


def test_an_image_is_that_of_its_number_and_class(alone: Path, trained: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run", sample=SAMPLE | {"classes": [1, 1, 2, 3], "count": 4})
    whole_stage(sample, stage_of("sample", run))
    assert np.array_equal(all_of(run)[1:], all_of(alone)[1:4])


@pytest.mark.parametrize(("wanted", "why"), [("noon", "no class 'noon'; a name, or 0 to 11"), (12, "no class '12'")])
def test_a_class_that_there_is_not(trained: Path, wanted: Any, why: str, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path / "run", sample=SAMPLE | {"classes": [wanted]})
    with pytest.raises(UserError, match=why):
        whole_stage(sample, stage_of("sample", run))
    assert not (run / "samples").exists()
