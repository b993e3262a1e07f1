import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data_helpers import SHARED, image_folder, picture
from vqscale import storage
from vqscale.data import images, tar
from vqscale.data.image_source import ImageSource
from vqscale.data.manifest import read_manifest
from vqscale.data.pack import finish, pack_images, plan_pack, write_shard
from vqscale.data.scan import scan, unpacked
from vqscale.data.shards import open_shards
from vqscale.data.verify import verify
from vqscale.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "src")


def packed_pictures(url: str) -> dict[int, int]:
    """Number of each picture (its first pixel) → label."""
    manifest = read_manifest(url)
    source = ImageSource(open_shards(url), 8)
    found = {}
    for shard in range(len(manifest.shards)):
        for fields, _ in source.read_shard(shard, 7):
            for image, label in zip(fields["image"], fields["label"], strict=True):
                assert (image == picture(int(image[0, 0, 0]))).all()
                found[int(image[0, 0, 0])] = int(label)
    return found


def test_packs_a_folder_whole_and_mixed(folder: Path, tmp_path: Path):
    dest = str(tmp_path / "out")
    manifest = pack_images(folder, dest, size=8, format="png", shard_samples=7)[dest]
    assert manifest.classes == ("class0", "class1", "class2")
    assert manifest.counts == [6, 6, 6, 6, 6]
    assert manifest == read_manifest(dest)
    assert verify(open_shards(dest)) == []
    assert packed_pictures(dest) == {number: number % 3 for number in range(30)}
    first = tar.samples(storage.open_shard(f"{dest}/shard-00000.tar"))
    assert [list(sample.fields) for sample in first] == [["cls", "png"]] * 6
    assert manifest.source["kept_unchanged"] == 30


def test_same_bytes_for_any_number_of_workers_and_for_a_tar(folder: Path, tmp_path: Path):
    archive = tmp_path / "src.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, "./top/src")
    how = {"size": 4, "shard_samples": 7, "holdout": 8, "seed": 3}
    made = [
        list(pack_images(source, str(tmp_path / f"out{i}"), workers=workers, **how).values())
        for i, (source, workers) in enumerate(((folder, 1), (folder, 2), (archive, 1)))
    ]
    hashes = [[shard.sha256 for manifest in both for shard in manifest.shards] for both in made]
    assert hashes[0] == hashes[1] == hashes[2]
    assert [manifest.samples for manifest in made[0]] == [22, 8]
    assert made[2][0].classes == ("class0", "class1", "class2")
    assert sorted(path.name for path in (tmp_path / "out0").iterdir()) == ["train", "validation"]


def test_holdout_splits_without_loss(folder: Path, tmp_path: Path):
    pack_images(folder, str(tmp_path / "out"), size=8, format="png", holdout=9)
    train, held = packed_pictures(f"{tmp_path}/out/train"), packed_pictures(f"{tmp_path}/out/validation")
    assert not train.keys() & held.keys()
    assert train.keys() | held.keys() == set(range(30))
    with pytest.raises(UserError, match="cannot hold out 30 of 30"):
        pack_images(folder, str(tmp_path / "more"), size=8, holdout=30)


def test_unreadable_files_are_listed_and_counted(folder: Path, tmp_path: Path):
    (folder / "class1" / "torn.png").write_bytes(images.encode_png(picture(1))[:70])
    (folder / "class1" / "none.jpg").write_bytes(b"")
    (folder / "class2" / "notes.txt").write_text("hello")
    (folder / "stray.png").write_bytes(images.encode_png(picture(1)))
    dest = str(tmp_path / "out")
    manifest = pack_images(folder, dest, size=8, format="png")[dest]
    assert manifest.samples == 30
    assert manifest.skipped == 4
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(listed) == [
        "corrupt\tclass1/torn.png",
        "format\tclass1/none.jpg",
        "no class\tstray.png",
        "not an image\tclass2/notes.txt",
    ]


def test_jpegs_of_the_right_size_keep_their_bytes(tmp_path: Path):
    original = images.encode_jpeg(picture(3, 16), 60)
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        (tmp_path / "src" / name / "0.jpg").write_bytes(original)
    Image.fromarray(picture(4, 32)).save(tmp_path / "src" / "b" / "1.webp", lossless=True)
    dest = str(tmp_path / "out")
    manifest = pack_images(tmp_path / "src", dest, size=16)[dest]
    assert manifest.source["kept_unchanged"] == 2
    assert manifest.source["encoded"] == 1
    buffer = storage.open_shard(f"{dest}/shard-00000.tar")
    stored = [
        buffer[at : at + size] for s in tar.samples(buffer) for name, (at, size) in s.fields.items() if name == "jpg"
    ]
    assert stored.count(original) == 2


def test_flat_folders_have_no_labels(tmp_path: Path):
    folder = image_folder(tmp_path / "src", classes=1)
    for source in (folder, folder / "class0"):
        assert scan(source).classes == ()
        assert {entry.label for entry in scan(source).entries} == {-1}
    dest = str(tmp_path / "out")
    pack_images(folder, dest, size=8)
    fields, _ = next(ImageSource(open_shards(dest), 8).read_shard(0, 50))
    assert (fields["label"] == -1).all()


def test_folders_that_are_no_classes_give_no_labels(folder: Path, tmp_path: Path):
    (folder / "stray.png").write_bytes(images.encode_png(picture(30)))
    dest = str(tmp_path / "out")
    manifest = pack_images(folder, dest, size=8, format="png", classes=())[dest]
    assert manifest.classes == ()
    assert manifest.skipped == 0, "without classes no image lies outside of them"
    assert packed_pictures(dest) == dict.fromkeys(range(31), -1)


def test_given_classes_keep_their_numbers(folder: Path):
    found = scan(folder, ("class2", "absent", "class0"))
    assert {entry.label for entry in found.entries} == {0, 2}
    assert {why for _, why in found.ignored} == {"no class"}


def test_unsafe_paths_of_a_tar_are_left_out(tmp_path: Path):
    content = images.encode_png(picture(1))
    with tarfile.open(tmp_path / "src.tar", "w") as file:
        for name in ("a/0.png", "b/1.png", "../up.png", "/abs/2.png", "a/../../3.png"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    dest = str(tmp_path / "out")
    manifest = pack_images(tmp_path / "src.tar", dest, size=8)[dest]
    assert (manifest.samples, manifest.skipped) == (2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src.tar"]


def test_bad_sources_are_one_clear_line(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08\x00rubbish")
    (tmp_path / "text.tar").write_text("hello" * 1000)
    cases = {"empty": "it is empty", "none": "no such file", "cut.tar.gz": "cut off", "text.tar": "is no tar"}
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            pack_images(tmp_path / name, str(tmp_path / "out"), size=8)
    for how in ({"size": 0}, {"size": 8, "quality": 0}, {"size": 8, "shard_samples": 0}):
        with pytest.raises(UserError):
            pack_images(folder, str(tmp_path / "out"), **how)
    assert not (tmp_path / "out").exists()


def test_a_source_without_one_readable_image_leaves_no_manifest(tmp_path: Path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not one image"):
        pack_images(tmp_path / "src", str(tmp_path / "out"), size=8)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_finished_destinations_are_replaced_only_by_force(folder: Path, tmp_path: Path):
    dest = str(tmp_path / "out")
    pack_images(folder, dest, size=8, shard_samples=5)
    with pytest.raises(UserError, match=r"packed already.*--force"):
        pack_images(folder, dest, size=8)
    pack_images(folder, dest, size=8, shard_samples=20, force=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "shard-00000.tar",
        "shard-00001.tar",
    ]


def test_shards_can_be_written_by_several_and_again(folder: Path, tmp_path: Path):
    plan = plan_pack(scan(folder), str(tmp_path / "out"), size=8, shards=4)
    packed = {number: write_shard(plan, number) for rank in (1, 0) for number in range(rank, 4, 2)}
    assert write_shard(plan, 2) == packed[2]
    manifest = finish(plan, [packed[number] for number in range(4)])
    assert manifest.samples == 30
    with pytest.raises(UserError, match="do not fill 31 shards"):
        plan_pack(scan(folder), str(tmp_path / "out"), size=8, shards=31)


def test_progress_counts_every_image(folder: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    pack_images(folder, str(tmp_path / "o"), size=8, shard_samples=8, progress=lambda *at: seen.append(at))
    assert seen[-1] == (30, 30)
    assert np.all(np.diff([done for done, _ in seen]) > 0)


def test_photographs_are_cut_and_resized(tmp_path: Path):
    archive = SHARED / "imagenet-samples-200.tar"
    if not archive.exists():
        pytest.skip("../shared/data/imagenet-samples-200.tar is not here")
    with unpacked(archive) as path:
        found = scan(path)
        assert len(found.entries) + len(found.ignored) >= 200
        plan = plan_pack(found, str(tmp_path / "out"), size=64, shards=20)
        assert write_shard(plan, 0).shard.samples == 10
    assert len(found.classes) == 200
