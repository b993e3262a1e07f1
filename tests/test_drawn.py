"""Drawn images on disk: every form holds the same images, in parts that outlive a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqscale.data.drawn import DrawnSet, open_drawn, write_parts
from vqscale.data.drawn_formats import FORMATS
from vqscale.data.image_source import ImageSource
from vqscale.data.npz import Streamed, map_npz, write_npz
from vqscale.data.shards import open_shards
from vqscale.data.verify import verify
from vqscale.errors import UserError
from vqscale.files import write_json

SIZE, COUNT = 4, 50
CLASSES = ("cat", "a/../b", ".hidden")


def drawn_set(folder: Path, output: str, **changes: Any) -> DrawnSet:
    facts = {"classes": CLASSES, "labels": tuple(n % 3 for n in range(COUNT)), "drawn_from": {"seed": 0}} | changes
    return DrawnSet(folder, output, SIZE, **facts)


def images_of(numbers: Sequence[int]) -> np.ndarray:
    return np.stack([np.random.default_rng(n).integers(0, 256, (SIZE, SIZE, 3), np.uint8) for n in numbers])


def fill(drawn: DrawnSet, parts: Sequence[int] | None = None) -> None:
    drawn.prepare(replace=True)
    for _ in write_parts(drawn, drawn.missing(parts), 7, images_of):
        pass


def times(folder: Path) -> dict[Path, int]:
    """When the files with images were written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.suffix in (".png", ".tar", ".npy")}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output", FORMATS)
def test_what_was_killed_goes_on(output: str, tmp_path: Path) -> None:
    """The parts that are whole stay as they are; what was being written is written again."""
    whole, killed = (drawn_set(tmp_path / name, output) for name in ("whole", "killed"))
    fill(whole)
    whole.finish()
    fill(killed, [0, 2, 3])
    before = times(killed.folder)
    (killed.folder / "parts" / "00003.json").unlink()  # written, but not recorded
    assert killed.missing() == [1, 3, 4, 5, 6]
    with pytest.raises(UserError, match="5 of 7 parts are missing"):
        killed.finish()
    drawn: list[int] = []

    def draw(numbers: Sequence[int]) -> np.ndarray:
        drawn.extend(numbers)
        return images_of(numbers)

    killed.prepare(replace=False)  # the same drawing: nothing has to be replaced
    counts = list(write_parts(killed, killed.missing(), 7, draw))
    assert counts == [7, 14, 21, 28, 34]
    assert sorted(drawn) == [n for n in range(COUNT) if not (n < 8 or 16 <= n < 24)]
    kept = before.items() & times(killed.folder).items()
    assert len(kept) == {"png": 16, "webdataset": 2, "npz": 2}[output]
    killed.finish()
    assert files_of(killed.folder) == files_of(whole.folder)
    assert killed.is_finished()
    assert not (killed.folder / "parts").exists()


@pytest.mark.parametrize("output", FORMATS)
@pytest.mark.parametrize("classes", [CLASSES, ()])
def test_every_form_gives_its_images_back(output: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    labels = tuple(n % 3 if classes else -1 for n in range(COUNT))
    drawn = drawn_set(tmp_path, output, classes=classes, labels=labels)
    fill(drawn)
    drawn.finish()
    read = open_drawn(tmp_path)
    assert (read.labels, read.classes, read.identity) == (labels, classes, drawn.identity)
    for numbers in (range(COUNT), [49, 0, 17, 8]):
        assert np.array_equal(read.read(numbers), images_of(list(numbers)))
    assert all(tmp_path in path.resolve().parents for path in tmp_path.rglob("*"))


def test_npz_is_that_of_adm(tmp_path: Path) -> None:
    drawn = drawn_set(tmp_path, "npz")
    fill(drawn)
    drawn.finish()
    with np.load(tmp_path / "samples.npz") as arrays:
        assert list(arrays) == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.shape, images.dtype, labels.dtype) == ((COUNT, SIZE, SIZE, 3), np.uint8, np.int64)
    assert np.array_equal(images, images_of(range(COUNT)))
    assert labels.tolist() == [n % 3 for n in range(COUNT)]


def test_shards_are_a_data_set(tmp_path: Path) -> None:
    drawn = drawn_set(tmp_path, "webdataset")
    fill(drawn)
    drawn.finish()
    shards = open_shards(str(tmp_path))
    assert verify(shards) == []
    assert shards.manifest.classes == CLASSES
    parts = [part for n in range(len(shards.urls)) for part in ImageSource(shards, SIZE).read_shard(n, 100)]
    assert np.concatenate([fields["label"] for fields, _ in parts]).tolist() == list(drawn.labels)
    assert np.array_equal(np.concatenate([fields["image"] for fields, _ in parts]), images_of(range(COUNT)))


@pytest.mark.parametrize("output", FORMATS)
def test_another_drawing_is_replaced_whole_or_refused(output: str, tmp_path: Path) -> None:
    fill(before := drawn_set(tmp_path, "png"))
    before.finish()
    after = drawn_set(tmp_path, output, labels=(0, 1, 2), drawn_from={"seed": 1})
    assert not after.is_finished()
    with pytest.raises(UserError, match="holds images of another drawing; name another folder"):
        after.prepare(replace=False)
    fill(after)
    after.finish()
    alone = drawn_set(tmp_path / "alone", output, labels=(0, 1, 2), drawn_from={"seed": 1})
    fill(alone)
    alone.finish()
    there = {name: data for name, data in files_of(tmp_path).items() if not name.startswith("alone/")}
    assert there == files_of(alone.folder)


@pytest.mark.parametrize("output", FORMATS)
def test_a_lost_file_is_noticed(output: str, tmp_path: Path) -> None:
    drawn = drawn_set(tmp_path, output)
    fill(drawn)
    drawn.finish()
    record = json.loads((tmp_path / "samples.json").read_text())
    (tmp_path / record["files"][0]).unlink()
    assert not drawn.is_finished()


def test_parts_follow_from_the_number_alone() -> None:
    def lengths(count: int) -> set[int]:
        parts = drawn_set(Path(), "png", labels=(0,) * count).parts
        assert [n for part in parts for n in part] == list(range(count))
        return {len(part) for part in parts[:-1]}

    assert (lengths(20), lengths(50_000), lengths(1_000_000)) == ({8}, {196}, {1_024})


def test_a_streamed_npz_is_numpys(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    write_npz(tmp_path / "a.npz", {"x": Streamed(array.shape, array.dtype, [array[:2], array[2:]])})
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["x"], array)
    np.savez(tmp_path / "b.npz", x=array)
    for name in ("a.npz", "b.npz"):
        assert np.array_equal(map_npz(tmp_path / name, "x"), array)
    np.savez_compressed(tmp_path / "c.npz", x=array)
    for name, why in (("c.npz", "is compressed"), ("d.npz", "holds no array x")):
        with pytest.raises(UserError, match=why):
            map_npz(tmp_path / name, "x")
    with pytest.raises(ValueError, match="its shape"):
        write_npz(tmp_path / "e.npz", {"x": Streamed((4, 3, 4), array.dtype, [array])})
    assert not (tmp_path / "e.npz").exists()


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "samples.json", {"labels": [0], "files": ["000000.png"]})
    with pytest.raises(UserError, match="of another version"):
        open_drawn(tmp_path)
