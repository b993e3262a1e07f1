"""The benchmark `loader`: its data are what it says, and it runs; what it measures is never asserted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import loader, loader_data, loader_peers, pagecache
from benchmarks.harness import Bench, WrongResultError
from benchmarks.loader_peers import Feed
from benchmarks.result import read_result
from vqscale.errors import UserError

LOADERS = ("ours", "webdataset_pil", "webdataset_simplejpeg", "image_folder")
RATIOS = {
    *("raw_vs_webdataset_pil", "raw_fraction_of_floor"),
    *("presized_vs_webdataset_simplejpeg", "presized_fraction_of_floor", "walk_vs_webdataset"),
}


def jpeg(height: int, width: int, value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "jpeg")
    return file.getvalue()


def test_generated_photographs_are_like_imagenets_and_always_the_same() -> None:
    files = list(loader_data.generate(60))
    found = loader_data.facts(files)
    assert (found["median_height"], found["median_width"]) == (375, 500)
    assert 95 <= found["mean_kb"] <= 125
    assert found["subsampling"]["444"] == pytest.approx(0.77, abs=0.15)
    assert set(found["subsampling"]) == {"444", "420"}
    assert list(loader_data.generate(2)) == files[:2]


def test_given_photographs_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a/1.JPEG", jpeg(20, 30)), ("b/2.png", b"\x89PNG\r\n\x1a\n"), ("b/3.jpg", jpeg(8, 8))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    given = loader_data.photographs(path, generated=1)
    assert (given.origin, len(given.files)) == ("given", 2)
    monkeypatch.setenv(loader_data.VARIABLE, str(path))
    assert loader_data.photographs(None, generated=1) == given
    monkeypatch.delenv(loader_data.VARIABLE)
    assert loader_data.photographs(None, generated=1).origin == "generated"
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="holds no JPEG"):
        loader_data.photographs(tmp_path / "only", generated=1)


def test_shards_repeat_the_files_under_labels_of_their_own(tmp_path: Path) -> None:
    files = [jpeg(16, 16, value) for value in (10, 100, 200)]
    shards = loader_data.write_shards(files, tmp_path, shards=2, per_shard=4)
    assert shards.samples == 8
    assert shards.contents() == [files[number % 3] for number in range(8)]
    assert [path.read_bytes() for path in loader_data.write_files(shards, tmp_path / "files")] == shards.contents()


def test_presized_files_keep_their_order_and_have_the_size(tmp_path: Path) -> None:
    values = (10, 100, 200)
    stored = loader_data.presized([jpeg(20, 30, value) for value in values], tmp_path, size=16, quality=90)
    for value, file in zip(values, stored, strict=True):
        with Image.open(io.BytesIO(file)) as image:
            assert image.size == (16, 16)
            assert abs(np.asarray(image).mean() - value) < 3
    assert loader_data.facts(stored)["subsampling"] == {"444": 1.0}


def test_sides_are_rounded_as_torchvision_does() -> None:
    assert loader_peers.shorter_side(500, 375, 256) == (341, 256)
    assert loader_peers.shorter_side(333, 500, 256) == (256, 384)
    assert loader_peers.shorter_side(256, 256, 256) == (256, 256)


def test_peers_decode_what_ours_decodes() -> None:
    y, x = np.mgrid[:300, :400]
    smooth = np.stack([y / 2, x / 2, (x + y) / 4], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "jpeg", quality=95)
    from vqscale.data import images

    expected = images.decode(file.getvalue(), 64).astype(int)
    for decode in (loader_peers.decode_pil, loader_peers.decode_simplejpeg):
        found = np.asarray(decode(file.getvalue(), 64))
        assert (found.shape, found.dtype) == ((64, 64, 3), np.uint8)
        assert np.abs(found - expected).mean() < 1


def test_a_loader_that_repeats_or_swaps_is_caught(tmp_path: Path) -> None:
    files = [jpeg(256, 256, value) for value in (0, 60, 120, 240)]
    shards = loader_data.write_shards(files, tmp_path, shards=2, per_shard=2)
    pixels = np.stack([np.full((256, 256, 3), value, np.uint8) for value in (0, 60, 120, 240)])

    def opened(order: list[int], labels: list[int]) -> loader.Opened:
        return loader.Opened(lambda: Feed(iter([(pixels[order], np.array(labels))])), shards.paths)

    def check(one: loader.Opened) -> None:
        loader.check(Bench("loader", tmp_path), "presized", {"someone": one}, shards)

    check(opened([3, 1, 2, 0], [3, 1, 2, 0]))
    with pytest.raises(WrongResultError, match=r"presized_someone_samples.*: 2, at most 0"):
        check(opened([0, 1, 2, 2], [0, 1, 2, 2]))
    with pytest.raises(WrongResultError, match="presized_someone_pixels"):
        check(opened([1, 0, 2, 3], [0, 1, 2, 3]))


def test_pages_are_dropped_unless_someone_maps_them(tmp_path: Path) -> None:
    shards = loader_data.write_shards([jpeg(256, 256)], tmp_path, shards=1, per_shard=64)
    shards.paths[0].read_bytes()
    before = loader_data.storage.open_shard(shards.paths[0])
    bytes(before[:])
    if pagecache.drop(shards.paths) < 0.5:
        pytest.fail("mapped pages cannot be dropped, so they must be reported")
    del before
    if pagecache.drop(shards.paths) > 0.5:
        pytest.skip("this file system keeps its pages")
    shards.paths[0].read_bytes()
    with shards.paths[0].open("rb") as file:
        here, whole = pagecache._resident(file.fileno())
    assert here == whole > 0


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole benchmark on a few generated images; asserts what is there, never a time."""
    threads = torch.get_num_threads()
    assert command.main(["loader", "--quick", "--out", str(tmp_path), "--json"]) == 0
    assert torch.get_num_threads() == threads
    result = read_result(tmp_path / "loader.json")
    assert json.loads(capsys.readouterr().out)["name"] == "loader"
    assert set(result.ratios) == set(result.intervals) == set(result.goals) == RATIOS
    expected = {f"{name}_{who}{cpu}" for name in ("raw", "presized") for who in LOADERS for cpu in ("", "_cpu")}
    assert expected <= set(result.figures)
    assert {"walk_ours", "walk_webdataset"} <= set(result.figures)
    assert {"raw_decode", "raw_decode_resize", "presized_decode"} <= set(result.floors)
    assert set(result.rounds) == {*result.figures, *result.floors}
    for name in ("raw", "presized"):
        cold = {f"{name}_{who}_cold" for who in LOADERS}
        assert cold <= set(result.figures) or f"{name}_cold" in result.skipped
        assert result.config[name]["files"] == 12
        for who in LOADERS:
            assert result.correctness[f"{name}_{who}_samples"].value == 0
            assert f"{name}_{who}_pixels" in result.correctness
    assert result.config["raw"]["origin"] == "generated"
    assert ("litdata" in result.skipped) != ("raw_litdata" in result.figures), "measured, or said to be left out"
