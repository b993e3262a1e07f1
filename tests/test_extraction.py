"""Extraction: every sample once, with the tokenizer's codes, however often it is stopped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import evaluate, extract_codes, train_prior
from pipelines.codes import main as codes_command
from pipelines.data_show import arranged
from tests.ranks import RanksFailedError, run_ranks
from tests.recipes import write_recipe
from tests.trained import save_tokenizer
from tests.training_helpers import clock_run, stage_of, whole_stage
from vqscale.data.bad import BadCount
from vqscale.data.code_records import read_record
from vqscale.data.code_source import CodeSource
from vqscale.data.codes import read_code_shard
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import read_manifest
from vqscale.data.shards import open_shards
from vqscale.data.verify import verify
from vqscale.errors import UserError
from vqscale.files import read_json, write_json
from vqscale.loading import load_tokenizer
from vqscale.models.pixels import from_uint8
from vqscale.training.distributed import process_group

SPLITS = ("train", "validation")
SHARDS: dict[str, Any] = {
    "data__clocks": {"train": 90, "validation": 20, "shards": 5},
    "extract": {"batch": 7, "block": 8},
}


def extract(run: Path) -> dict[str, Any]:
    """One rank of the stage."""
    with process_group("cpu", 60) as ranks:
        return whole_stage(extract_codes, stage_of("extract", run, ranks))


def extract_and_die(run: Path, shards: int) -> None:
    """As a kill: after so many shards of each rank, the next one is written but not yet recorded."""
    written = 0
    write_record = extract_codes.write_record

    def write(folder: str, record: Any) -> None:
        nonlocal written
        written += 1
        if written > shards:
            raise KeyboardInterrupt
        write_record(folder, record)

    extract_codes.write_record = write  # type: ignore[assignment]
    extract(run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run extracted over two ranks, and what each rank's stage returned."""
    run = clock_run(tmp_path_factory.mktemp("extraction") / "run", **SHARDS)
    save_tokenizer(run, 0)
    return run, run_ranks(2, extract, run)


def images_of(run: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """All images of a split in order, with labels and keys, shard by shard."""
    url = str(run / "shards" / split)
    manifest = read_manifest(url)
    parts = [part for n in range(len(manifest.shards)) for part in ImageSource(open_shards(url), 16).read_shard(n, 100)]
    fields = [part[0] for part in parts]
    keys = [key for part in parts for key in part[1]]
    return np.concatenate([f["image"] for f in fields]), np.concatenate([f["label"] for f in fields]), keys


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "codes").rglob("*.tar*"))}


@pytest.mark.dist
@pytest.mark.parametrize("split", SPLITS)
def test_shards_hold_the_tokenizers_codes(finished: tuple[Path, Any], split: str) -> None:
    run, _ = finished
    images, labels, keys = images_of(run, split)
    url = str(run / "codes" / split)
    manifest = read_manifest(url)
    assert verify(open_shards(url)) == []
    assert [shard.name for shard in manifest.shards] == [s.name for s in read_manifest(run / "shards" / split).shards]
    parts = [part for n in range(len(manifest.shards)) for part in CodeSource(open_shards(url)).read_shard(n, 100)]
    assert [key for part in parts for key in part[1]] == keys
    assert max(Counter(keys).values()) == 1
    assert (np.concatenate([part[0]["label"] for part in parts]) == labels).all()
    expected = load_tokenizer(run).encode(images)
    for name, grid in expected.items():
        got = np.concatenate([part[0][name] for part in parts])
        assert got.dtype == np.uint16
        assert np.array_equal(got, grid), name
        assert len(np.unique(grid)) > 4


@pytest.mark.dist
def test_usage_is_that_of_the_shards(finished: tuple[Path, Any]) -> None:
    run, (first, second) = finished
    assert first == second
    assert (first["train_samples"], first["validation_samples"]) == (90, 20)
    paths = sorted((run / "codes" / "train").glob("*.tar"))
    for name in ("bottom", "top"):
        codes = np.concatenate([read_code_shard(path)[name].ravel() for path in paths])
        counts = np.bincount(codes, minlength=16)
        share = counts[counts > 0] / counts.sum()
        assert first[f"usage_{name}"] == (counts > 0).mean()
        assert first[f"perplexity_{name}"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


@pytest.mark.dist
def test_the_number_of_ranks_changes_nothing(finished: tuple[Path, Any], tmp_path: Path) -> None:
    run, (figures, _) = finished
    alone = clock_run(tmp_path / "alone", **SHARDS)
    save_tokenizer(alone, 0)
    assert whole_stage(extract_codes, stage_of("extract", alone)) == figures
    assert contents(alone) == contents(run)


@pytest.mark.dist
@pytest.mark.fault
def test_killed_and_started_again(finished: tuple[Path, Any], tmp_path: Path) -> None:
    undisturbed, (figures, _) = finished
    run = clock_run(tmp_path / "killed", **SHARDS)
    save_tokenizer(run, 0)
    with pytest.raises(RanksFailedError, match="KeyboardInterrupt"):
        run_ranks(2, extract_and_die, run, 1)
    folder = run / "codes" / "train"
    assert not (folder / "manifest.json").exists()
    fingerprint = load_tokenizer(run).fingerprint
    recorded = [path for path in sorted(folder.glob("*.tar")) if read_record(str(folder), path.name, fingerprint)]
    assert 1 <= len(recorded) < len(list(folder.glob("*.tar"))), (
        "some are recorded, and one is written but not recorded"
    )
    before = {path: path.stat().st_mtime_ns for path in recorded}
    recorded[0].with_name("half.tmp").write_bytes(b"left by somebody")
    for name in (recorded[0].name, f"{recorded[-1].name}.json", "manifest.json"):
        (folder / f".{name}.4711").write_bytes(b"left by the one that was killed")
    assert whole_stage(extract_codes, stage_of("extract", run)) == figures
    assert {path: path.stat().st_mtime_ns for path in recorded} == before
    assert not list(folder.glob(".*.4711"))
    assert contents(run) == contents(undisturbed)
    again = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    whole_stage(extract_codes, stage_of("extract", run))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")} == again


@pytest.fixture
def extracted(tmp_path: Path) -> Path:
    run = clock_run(tmp_path / "run", **SHARDS)
    save_tokenizer(run, 0)
    whole_stage(extract_codes, stage_of("extract", run))
    return run


def test_a_lost_or_cut_shard_is_written_again(extracted: Path) -> None:
    whole = contents(extracted)
    first, second, *_ = sorted((extracted / "codes" / "train").glob("*.tar"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    whole_stage(extract_codes, stage_of("extract", extracted))
    assert contents(extracted) == whole


def test_another_tokenizer_makes_all_of_it_stale(extracted: Path) -> None:
    before, old = contents(extracted), load_tokenizer(extracted)
    save_tokenizer(extracted, 1, step=16)
    new = load_tokenizer(extracted)
    assert new.fingerprint != old.fingerprint
    with pytest.raises(UserError, match="made by another tokenizer; run the stage 'extract' again") as caught:
        train_prior.main(stage_of("prior", extracted))
    assert len(str(caught.value).splitlines()) == 1
    assert str(extracted / "codes" / "train") in str(caught.value)
    whole_stage(extract_codes, stage_of("extract", extracted))
    after = contents(extracted)
    assert after.keys() == before.keys()
    assert not any(after[name] == before[name] for name in after)
    for split in SPLITS:
        assert read_manifest(extracted / "codes" / split).fingerprint == new.fingerprint
    images, _, _ = images_of(extracted, "validation")
    path = extracted / "codes" / "validation" / read_manifest(extracted / "codes" / "validation").shards[0].name
    assert np.array_equal(
        read_code_shard(path)["bottom"], new.encode(images)["bottom"][: len(read_code_shard(path)["label"])]
    )


def test_stopped_between_two_tokenizers(extracted: Path) -> None:
    """Shards of both lie in the folder: the old manifest must not make a prior believe them."""
    save_tokenizer(extracted, 1, step=16)
    stage = stage_of("extract", extracted)
    tokenizer = load_tokenizer(extracted)
    url = str(extracted / "shards" / "train")
    source = ImageSource(open_shards(url), 16)
    folder = str(extracted / "codes" / "train")
    how = extract_codes.extraction(stage, tokenizer, "train")
    for record in how.shards(source, [0], folder, BadCount(0.0)):
        extract_codes.write_record(folder, record)
    with pytest.raises(UserError, match="made by another tokenizer"):
        train_prior.main(stage_of("prior", extracted))


def test_unreadable_images_have_no_codes_and_are_counted(tmp_path: Path) -> None:
    from tests.data_helpers import image_shards

    for split, broken in (("train", {3: b"no image", 12: b""}), ("validation", {})):
        image_shards(tmp_path / split, [10, 10], broken=broken)
    run = tmp_path / "run"
    run.mkdir()
    shards = {"train": str(tmp_path / "train"), "validation": str(tmp_path / "validation")}
    data = {"image_size": 16, "streams": 2, "packet": 2, **shards}
    write_recipe(run / "recipe.yaml", data=data)
    save_tokenizer(run, 0)
    with pytest.raises(UserError, match="2 of 20 samples are bad"):
        whole_stage(extract_codes, stage_of("extract", run))
    write_recipe(run / "recipe.yaml", data=data | {"error_budget": 0.01})
    figures = whole_stage(extract_codes, stage_of("extract", run))
    manifest = read_manifest(run / "codes" / "train")
    assert (manifest.samples, manifest.skipped, manifest.counts) == (18, 2, [9, 9])
    assert (figures["train_samples"], figures["train_skipped"]) == (18, 2)
    keys = [
        key
        for n in range(2)
        for _, part in CodeSource(open_shards(str(run / "codes" / "train"))).read_shard(n, 50)
        for key in part
    ]
    assert not {"000003", "000012"} & set(keys)


def test_codes_are_decoded_by_their_own_tokenizer_alone(
    extracted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sheet = str(extracted / "codes"), tmp_path / "sheet.png"
    ours = ["--tokenizer", str(extracted)]
    assert codes_command(["verify", folder, *ours]) == 0
    assert codes_command(["show", f"{folder}/train", *ours, "--out", str(sheet), "--samples", "5"]) == 0
    stored = read_code_shard(f"{folder}/train/shard-00000.tar")
    images = load_tokenizer(extracted).decode({name: grids[:5] for name, grids in stored.items()})
    assert sheet.read_bytes() == arranged(images, stored["label"][:5], read_manifest(f"{folder}/train").classes)
    save_tokenizer(extracted, 1, step=16)
    for words in (["verify", folder, *ours], ["show", folder, *ours, "--out", str(tmp_path / "no.png")]):
        capsys.readouterr()
        assert codes_command(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "these codes were made by another tokenizer than that of" in line
    assert not (tmp_path / "no.png").exists()


def test_encoding_does_not_depend_on_the_batch(extracted: Path) -> None:
    tokenizer = load_tokenizer(extracted)
    images, _, _ = images_of(extracted, "validation")
    whole = tokenizer.encode(images)
    single = [tokenizer.encode(image[None]) for image in images]
    for name, grid in whole.items():
        assert np.array_equal(np.concatenate([one[name] for one in single]), grid)
    assert tokenizer.decode(whole).shape == images.shape


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_codes_are_those_that_training_picks(precision: str, tmp_path: Path) -> None:
    """Under the precision that the recipe trains with, whatever surrounds the call, at the extraction's batch."""
    run = clock_run(tmp_path / "run", **SHARDS, tokenizer__training__precision=precision)
    save_tokenizer(run, 0)
    whole_stage(extract_codes, stage_of("extract", run))
    tokenizer = load_tokenizer(run)
    url = run / "codes" / "validation"
    stored = read_code_shard(url / read_manifest(url).shards[0].name)
    images = images_of(run, "validation")[0][:7]  # one batch
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        trained = tokenizer.network(from_uint8(images, torch.device("cpu"))).levels
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "fp32"):
        encoded = tokenizer.encode(images)
    for name, level in zip(tokenizer.levels, trained, strict=True):
        assert np.array_equal(encoded[name], level.codes.numpy())
        assert np.array_equal(stored[name][:7], level.codes.numpy())


def test_images_of_another_size_are_refused(extracted: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer takes"):
        load_tokenizer(extracted).encode(np.zeros((1, 8, 8, 3), np.uint8))


def test_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    run = clock_run(tmp_path / "run", **SHARDS)
    with pytest.raises(UserError, match="no checkpoint; run the stage 'tokenizer' first"):
        whole_stage(extract_codes, stage_of("extract", run))


def test_records_are_json(extracted: Path) -> None:
    record = read_json(next((extracted / "codes" / "train").glob("*.tar.json")))
    assert record["shard"]["samples"] == 18


def test_the_number_of_threads_changes_nothing(extracted: Path, tmp_path: Path) -> None:
    many = clock_run(tmp_path / "many", **SHARDS, data__threads=5)
    save_tokenizer(many, 0)
    whole_stage(extract_codes, stage_of("extract", many))
    assert contents(many) == contents(extracted)


def test_flips_are_samples_of_their_own(extracted: Path, tmp_path: Path) -> None:
    """Behind each training image its mirror image; held-out images are left as they are."""
    plain = contents(extracted)
    recipe = extracted / "recipe.yaml"
    write_recipe(recipe, **SHARDS | {"extract": SHARDS["extract"] | {"flips": True}})
    figures = whole_stage(extract_codes, stage_of("extract", extracted))
    assert (figures["train_samples"], figures["validation_samples"]) == (180, 20)
    images, labels, keys = images_of(extracted, "train")
    source = CodeSource(open_shards(str(extracted / "codes" / "train")))
    parts = [part for n in range(len(source.manifest.shards)) for part in source.read_shard(n, 100)]
    found = [key for _, names in parts for key in names]
    assert found == [name for key in keys for name in (key, f"{key}~flip")]
    assert (np.concatenate([fields["label"] for fields, _ in parts]) == labels.repeat(2)).all()
    tokenizer = load_tokenizer(extracted)
    for name in tokenizer.levels:
        codes = np.concatenate([fields[name] for fields, _ in parts])
        assert np.array_equal(codes[0::2], tokenizer.encode(images)[name])
        assert np.array_equal(codes[1::2], tokenizer.encode(np.ascontiguousarray(images[:, :, ::-1]))[name])
    after = contents(extracted)
    same = {name for name in plain if after[name] == plain[name]}
    assert {name.split("/")[1] for name in same} == {"validation"}
    write_recipe(recipe, **SHARDS)
    whole_stage(extract_codes, stage_of("extract", extracted))
    assert contents(extracted) == plain


def test_bf16_says_how_many_codes_fp32_would_change(tmp_path: Path) -> None:
    run = clock_run(tmp_path / "run", **SHARDS, tokenizer__training__precision="bf16")
    save_tokenizer(run, 0)
    figures = whole_stage(extract_codes, stage_of("extract", run))
    tokenizer, (images, _, _) = load_tokenizer(run), images_of(run, "validation")
    assert len(images) == 20
    exact = replace(tokenizer, bf16=False)
    differing = total = 0
    for start in range(0, 20, SHARDS["extract"]["batch"]):
        ours, theirs = (one.encode(images[start : start + SHARDS["extract"]["batch"]]) for one in (tokenizer, exact))
        differing += sum(int((ours[name] != theirs[name]).sum()) for name in ours)
        total += sum(grid.size for grid in ours.values())
    assert figures["codes_differ_from_fp32"] == differing / total
    stage = stage_of("evaluate", run)
    write_json(stage.layout.done("extract"), figures)
    assert evaluate.assemble(stage, {}, 0.0)["codes_differ_from_fp32"] == differing / total
    assert 0 < differing < total / 2
