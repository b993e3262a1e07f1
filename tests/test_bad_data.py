"""Bad samples of every kind: found, replaced, counted over all ranks, listed, and stopped above the budget."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from launcher.cli import main
from launcher.status import read_status
from launcher.wording import below
from tests.data_helpers import picture
from tests.recipes import tiny_recipe
from tests.test_data_images import _huge_png
from tests.training_helpers import clock_run, tokenizer_experiment
from vqscale import storage
from vqscale.config.recipe import Recipe
from vqscale.data import tar
from vqscale.data.bad import KINDS, BadCount, BadPick, check_budget
from vqscale.data.image_source import ImageSource
from vqscale.data.images import encode_jpeg, encode_png
from vqscale.data.loader import Loader
from vqscale.data.manifest import IMAGES, Manifest, Shard, hash_bytes, read_manifest, write_manifest
from vqscale.data.order import StreamOrder
from vqscale.data.reader import EvaluationReader
from vqscale.data.shards import open_shards
from vqscale.errors import UserError
from vqscale.quarantine import Quarantine, count_by_kind, read_quarantine
from vqscale.training.distributed import process_group

CLASSES = ("cat", "dog", "owl")


GOOD = {"png": encode_png(picture(7)), "cls": b"1"}
PLANTED = {
    "a/003": ("format", {**GOOD, "png": b"<html>404</html>"}),
    "a/009": ("corrupt", {"jpg": encode_jpeg(picture(9, 16), 90)[:-40], "cls": b"0"}),
    "a/012": ("bomb", {**GOOD, "png": _huge_png()}),
    "a/017": ("missing", {"cls": b"2", "json": b"{}"}),
    "a/021": ("label", {**GOOD, "cls": b"3"}),
    "a/025": ("label", {**GOOD, "cls": b"\xff\xfe"}),
    "../b/026": ("path", GOOD),
    "/b/027": ("path", GOOD),
    "a/../../c/028": ("path", GOOD),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of forty samples: every fault in the first, and the last one cut off after packing."""
    root, shards = tmp_path_factory.mktemp("bad"), []
    for place in range(6):
        samples = [(f"a/{number:03d}", dict(GOOD)) for number in range(40)]
        if place == 0:
            named = {int(key.rpartition("/")[2]): (key, fields) for key, (_, fields) in PLANTED.items()}
            samples = [named.get(number, sample) for number, sample in enumerate(samples)]
        with (root / f"s{place}.tar").open("wb") as file:
            tar.write(file, samples)
        content = (root / f"s{place}.tar").read_bytes()
        shards.append(Shard(name=f"s{place}.tar", samples=40, bytes=len(content), sha256=hash_bytes(content)))
    write_manifest(root, Manifest(format=IMAGES, shards=tuple(shards), classes=CLASSES, image_size=8))
    (root / "s5.tar").write_bytes((root / "s5.tar").read_bytes()[: 30 * 2048 + 700])
    return root


def expected() -> set[tuple[str, str, str]]:
    cut = {("s5.tar", f"#{number}", "truncated") for number in range(30, 40)}
    return {("s0.tar", key, kind) for key, (kind, _) in PLANTED.items()} | cut


@pytest.mark.parametrize("threads", [1, 3])
def test_the_loader_names_exactly_the_bad_ones(folder: Path, threads: int):
    shards = open_shards(str(folder))
    order = StreamOrder(shards.counts, seed=1, streams=3, packet=4, shuffle=80)
    source = ImageSource(shards, 8)
    with Loader(source, order, rank=0, world=1, global_batch=24, threads=threads, error_budget=1.0) as loader:
        batches = list(islice(loader, 10))  # one epoch: 240 samples
        assert loader.read == 240
        assert set(loader.bad_samples) == expected()
        assert sum(loader.bad.values()) == len(expected())
        assert set(loader.bad) == set(KINDS)
    assert all((batch.fields["image"] == picture(7)).all() for batch in batches)
    assert all((batch.fields["label"] == 1).all() for batch in batches)


@pytest.mark.parametrize("threads", [1, 4])
def test_evaluation_leaves_exactly_the_bad_ones_out(folder: Path, threads: int):
    source, found, index = ImageSource(open_shards(str(folder)), 8), set(), []
    for rank in range(2):
        reader = EvaluationReader(source, source.shards.counts, rank, 2, 16, threads=threads, error_budget=1.0)
        for batch in reader:
            assert (batch.fields["image"] == picture(7)).all()
            index.extend(batch.index.tolist())
        found |= set(reader.bad_samples)
    assert found == expected()
    assert len(index) == len(set(index)) == 240 - len(expected())


def test_the_budget_is_judged_over_all_ranks():
    check_budget({"corrupt": 10}, 10_000, 0.001)
    with pytest.raises(UserError, match=r"11 of 10000 samples are bad \(8 corrupt, 3 label\)"):
        check_budget({"corrupt": 8, "label": 3}, 10_000, 0.001)
    count = BadCount(0.01, world=4)  # 2 % here may be 0.5 % in all
    count.add(10_000, [BadPick(0, "s", f"{number}", "corrupt") for number in range(200)])
    with pytest.raises(UserError, match="the last one is z in s"):
        count.add(0, [BadPick(0, "s", "z", "corrupt")] * 201)


def test_a_quarantine_list_names_each_once_and_survives_a_kill(tmp_path: Path):
    path = tmp_path / "stage" / "quarantine.jsonl"
    Quarantine(path).add([])
    assert not path.exists()
    Quarantine(path).add([("s0", "a", "corrupt"), ("s0", "b", "label"), ("s0", "a", "corrupt")])
    path.write_bytes(path.read_bytes()[:-9])  # killed while it was written
    again = Quarantine(path)
    again.add([("s0", "a", "corrupt"), ("s0", "b", "label"), ("s1", "c\udcff", "label")])
    lines = read_quarantine(path)
    assert [(line["shard"], line["key"]) for line in lines] == [("s0", "a"), ("s0", "b"), ("s1", "c\udcff")]
    assert count_by_kind(path) == {"label": 2, "corrupt": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]]]:
    """A run directory with three broken images among its 96 training images; which ones: (shard, key)."""
    run = clock_run(tmp_path_factory.mktemp("run") / "run")
    folder, broken = run / "shards" / "train", []
    manifest = read_manifest(folder)
    shards = list(manifest.shards)
    for place in (0, 1, 3):
        path = folder / shards[place].name
        content = bytearray(path.read_bytes())
        sample = tar.samples(bytes(content))[2]
        offset, _ = sample.fields["png"]
        content[offset + 60] ^= 0xFF
        path.write_bytes(content)
        broken.append((shards[place].name, sample.key))
    return run, broken


def train(run: Path, recipe: Recipe, folder: Path) -> tuple[dict[str, float], str]:
    """Train on this process's ranks; the last figures of rank 0, and what stopped the run."""
    with process_group("cpu", 60) as ranks:
        made = tokenizer_experiment(ranks, run, recipe)
        try:
            made.run(folder)
        except UserError as error:
            return {}, str(error)
        return (made.recorder.lines[recipe.tokenizer.training.steps] if ranks.first else {}), ""


@pytest.mark.dist
def test_two_ranks_count_list_and_stop_together(run, tmp_path: Path):
    from tests.ranks import run_ranks

    path, broken = run
    settings = {"steps": 20, "log_every": 5}
    recipe = tiny_recipe(
        data__error_budget=0.5, **{f"tokenizer__training__{name}": value for name, value in settings.items()}
    )
    (figures, _), (_, stopped) = run_ranks(2, train, path, recipe, tmp_path / "lenient")
    assert not stopped
    lines = read_quarantine(tmp_path / "lenient" / "quarantine.jsonl")
    assert {(line["shard"], line["key"]) for line in lines} == set(broken)
    assert figures["data/bad_samples"] == figures["data/bad_corrupt"] >= len(broken)
    strict = recipe.model_copy(update={"data": recipe.data.model_copy(update={"error_budget": 0.0})})
    stopped_by = [error for _, error in run_ranks(2, train, path, strict, tmp_path / "strict")]
    assert stopped_by[0]
    assert all("samples are bad" in error and "data.error_budget" in error for error in stopped_by)


def test_status_shows_them(home: Path, capsys: pytest.CaptureFixture[str]):
    from tests.test_launcher_runs import new_run

    layout = new_run(home, "mine")
    bad = [("s0", str(number), "corrupt") for number in range(2)]
    Quarantine(layout.quarantine("tokenizer")).add([*bad, ("s1", "x", "label")])
    said = "tokenizer: 3 bad samples (2 corrupt, 1 label), listed in stages/tokenizer/quarantine.jsonl"
    assert below(read_status(layout)) == [said]
    assert main(["status", "mine"]) == 0
    assert said in capsys.readouterr().out
    assert main(["status", "mine", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {stage["stage"]: stage["bad"] for stage in stages}["tokenizer"] == {"corrupt": 2, "label": 1}


def test_a_decoder_of_another_kind_takes_the_same_place(folder: Path, tmp_path: Path):
    """What a GPU's decoder has to do: whole packets, rows of the batch, bad ones by place and kind."""
    shutil.copytree(folder, tmp_path / "shards")
    calls = []

    def decoder(files, out):
        calls.append(len(files))
        bad = []
        for place, data in enumerate(files):
            if data is not None and bytes(data[:4]) != b"\x89PNG":
                bad.append((place, "format"))
            elif data is not None:
                out[place] = 77
        return bad

    source = ImageSource(open_shards(str(tmp_path / "shards")), 8, decoder=decoder)
    order = StreamOrder(source.shards.counts, seed=1, streams=3, packet=8, shuffle=80)
    with Loader(source, order, rank=0, world=1, global_batch=24, error_budget=1.0) as loader:
        for batch in islice(loader, 10):
            assert (batch.fields["image"] == 77).all()
        assert loader.bad["format"] == 2  # the JPEG, and the page that is no image
    assert set(calls) <= {8, 1}  # packets, and replacements one by one


def test_decoding_on_a_gpu_is_refused_without_one():
    import torch

    from vqscale.training.gpu_decode import GpuDecoder

    with pytest.raises(UserError, match=r"data\.decoder: decoding on the GPU runs on cpu; set it to cpu"):
        GpuDecoder(torch.device("cpu"))


def test_storage_keeps_the_buffer_while_a_view_is_used(folder: Path):
    view = memoryview(storage.open_shard(folder / "s1.tar"))[:512]
    assert np.frombuffer(view, np.uint8).sum() > 0
