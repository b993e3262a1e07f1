"""Manifests of shards as other tools write them; webdataset is the reference for what they hold."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from tests.data_helpers import picture
from tests.foreign_shards import (
    class_folders,
    gnu_tar,
    image,
    img2dataset,
    numbered,
    read_with_webdataset,
    shards,
    tar_bytes,
    write_tar,
)
from vqscale import storage
from vqscale.data import tar
from vqscale.data.bad import BadPick
from vqscale.data.image_source import ImageSource
from vqscale.data.indexing.index import Indexed, classes_of, index_shards, read_classes, write_index
from vqscale.data.shards import ShardSet, check_shards, open_shards
from vqscale.data.threads import in_threads
from vqscale.data.verify import verify
from vqscale.errors import UserError

FORMS = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
FOLDERS = [f"{name}/{number}.jpg" for name in ("cats", "dogs", "owls") for number in range(4)]


def index(spec: str | Path, **how: Any) -> ShardSet:
    """Index shards, write the manifest, and open it."""
    (found,) = index_shards(str(spec), **how)
    write_index(found)
    opened = open_shards(str(spec) if not how.get("out") else how["out"])
    check_shards(opened)
    return opened


def read_all(opened: ShardSet) -> tuple[list[str], list[int], list[BadPick]]:
    """Keys and labels of all good samples, as training reads them, and the bad ones."""
    source = ImageSource(opened, 8)
    keys, labels, bad = [], [], list[BadPick]()
    for shard in range(len(opened.urls)):
        for fields, some in source.read_shard(shard, 4, bad):
            keys += some
            labels += fields["label"].tolist()
    return keys, labels, bad


def test_img2dataset(tmp_path: Path):
    img2dataset(tmp_path, [30, 20])
    opened = index(tmp_path)
    manifest = opened.manifest
    assert (manifest.label, manifest.classes, manifest.image_size, opened.counts) == ("none", (), 8, [30, 20])
    assert "the texts in .txt are captions: 50 different ones in 50 samples" in manifest.source["label_reason"]
    keys, labels, bad = read_all(opened)
    assert (labels, bad) == ([-1] * 50, [])
    for path in (tmp_path / "00000.tar", tmp_path / "00001.tar"):
        theirs = read_with_webdataset(path)
        assert [sample["__key__"] for sample in theirs] == keys[: len(theirs)]
        del keys[: len(theirs)]
        assert sorted(theirs[0]) == ["__key__", "jpg", "json", "txt"]
    assert verify(opened) == []


def test_img2dataset_without_captions_and_with_labels_in_a_column(tmp_path: Path):
    img2dataset(tmp_path / "plain", [3], captions=False)
    assert index(tmp_path / "plain").manifest.label == "none"

    def meta(number: int) -> bytes:
        return json.dumps({"caption": f"photograph {number}", "class": ("ox", "ant")[number % 2]}, indent=4).encode()

    shards(tmp_path / "labelled", {"0.tar": 3, "1.tar": 3}, json=meta, txt=lambda n: b"photograph %d" % n)
    opened = index(tmp_path / "labelled")
    assert (opened.manifest.label, opened.manifest.classes) == ("json:class", ("ant", "ox"))
    assert read_all(opened)[1] == [1, 0] * 3


@pytest.mark.parametrize("prefix", ["", "./", "photos/2024/"])
@pytest.mark.parametrize("form", FORMS)
def test_class_folders_by_python(form: int, prefix: str, tmp_path: Path):
    class_folders(tmp_path / "a.tar", form, FOLDERS, prefix=prefix)
    opened = index(tmp_path / "a.tar")
    depth = prefix.removeprefix("./").count("/")
    assert opened.manifest.label == (f"folder:{depth}" if depth else "folder")
    assert opened.manifest.classes == ("cats", "dogs", "owls")
    keys, labels, bad = read_all(opened)
    assert (labels, bad) == ([0] * 4 + [1] * 4 + [2] * 4, [])
    assert keys == [sample["__key__"] for sample in read_with_webdataset(tmp_path / "a.tar")]
    assert keys[0] == f"{prefix}cats/0"


@pytest.mark.parametrize("what", [["."], ["cats", "dogs", "owls"]])
def test_class_folders_by_the_tar_of_the_system(what: list[str], tmp_path: Path):
    deep = "a-folder-with-a-name-that-is-long-enough-for-an-extension-header/" * 3
    names = [*FOLDERS, f"owls/{deep}picture.jpg"]
    gnu_tar(tmp_path / "shards" / "a.tar", names, tmp_path / "photos", *what)
    opened = index(tmp_path / "shards")
    assert (opened.manifest.label, opened.manifest.classes) == ("folder", ("cats", "dogs", "owls"))
    keys, labels, _ = read_all(opened)
    assert labels == [0] * 4 + [1] * 4 + [2] * 5
    assert keys == [sample["__key__"] for sample in read_with_webdataset(tmp_path / "shards" / "a.tar")]
    assert opened.manifest.source["images"] == {"jpg": 13}


def test_mixed_formats_and_upper_case(tmp_path: Path):
    extensions = ("jpg", "JPG", "jpeg", "JPEG", "png", "PNG", "webp", "WebP")
    samples = [(f"{n:04d}", {end: image(end, n), "CLS": b"%d" % (n % 3)}) for n, end in enumerate(extensions)]
    write_tar(tmp_path / "a.tar", samples)
    opened = index(tmp_path)
    assert opened.manifest.source["images"] == {"jpg": 2, "jpeg": 2, "png": 2, "webp": 2}
    keys, labels, bad = read_all(opened)
    assert (keys, labels, bad) == ([f"{n:04d}" for n in range(8)], [n % 3 for n in range(8)], [])
    theirs = read_with_webdataset(tmp_path / "a.tar")
    assert [int(sample["cls"]) for sample in theirs] == labels
    fields, _ = next(ImageSource(opened, 8).read_shard(0, 8))
    assert (fields["image"][4] == picture(4)).all()


def word(number: int) -> bytes:
    return (b"bee", b"ant", b"cow")[number % 3]


LABELS: list[tuple[dict[str, Callable[[int], bytes]], str, tuple[str, ...]]] = [
    ({"cls": lambda n: b"%d" % (n % 3)}, "cls", ("0", "1", "2")),
    ({"cls": word}, "cls", ("ant", "bee", "cow")),
    ({"txt": word}, "txt", ("ant", "bee", "cow")),
    ({"txt": lambda n: b"%d\n" % (n % 3)}, "txt", ("0", "1", "2")),
    ({"json": lambda n: b'{"label": %d}' % (n % 3)}, "json:label", ("0", "1", "2")),
    ({"json": lambda n: b'{"id": "x", "target": "%s"}' % word(n)}, "json:target", ("ant", "bee", "cow")),
    ({"json": lambda n: b'{"id": %d}' % n}, "none", ()),
    ({}, "none", ()),
]


@pytest.mark.parametrize(
    ("fields", "rule", "classes"),
    LABELS,
    ids=[f"{rule}-{len(classes)}-{number}" for number, (_, rule, classes) in enumerate(LABELS)],
)
def test_labels_wherever_they_are(
    fields: dict[str, Callable[[int], bytes]], rule: str, classes: tuple[str, ...], tmp_path: Path
):
    shards(tmp_path, {"a.tar": 20, "b.tar": 16}, **fields)
    opened = index(tmp_path)
    assert (opened.manifest.label, opened.manifest.classes) == (rule, classes)
    keys, labels, bad = read_all(opened)
    assert keys == [f"{number:08d}" for number in range(36)]
    assert bad == []
    if rule == "none":
        expected = [-1] * 36
    elif classes[0] == "0":
        expected = [number % 3 for number in range(36)]
    else:
        expected = [classes.index(word(number).decode()) for number in range(36)]
    assert labels == expected


def test_samples_without_and_with_bad_labels_are_told_apart(tmp_path: Path):
    labels = {0: b"0", 1: b"1", 2: b"\xff", 3: b"", 4: b"0"}
    write_tar(
        tmp_path / "a.tar",
        [(f"{n}", {"png": image("png", n), **({"cls": labels[n]} if n in labels else {})}) for n in range(7)],
    )
    opened = index(tmp_path)
    source = opened.manifest.source
    assert (source["labelled"], source["bad_labels"], source["label_reason"]) == (3, 2, "3 of 7 samples have one")
    _, numbers, bad = read_all(opened)
    assert numbers == [0, 1, 0, -1, -1]
    assert [(pick.key, pick.kind) for pick in bad] == [("2", "label"), ("3", "label")]


def test_what_training_will_call_bad_is_counted(tmp_path: Path):
    samples = [
        ("0", {"png": image("png")}),
        ("1", {"txt": b"alone"}),
        ("../2", {"png": image("png")}),
        ("img.3", {"png": image("png")}),  # the key ends at the first dot
        ("4", {"png": b"no image"}),
    ]
    write_tar(tmp_path / "a.tar", samples)
    source = index(tmp_path, label="none").manifest.source
    assert source["images"] == {"png": 3}
    assert (source["without_image"], source["without_image_example"]) == (2, "1 with .txt")
    assert (source["unsafe_keys"], source["headers_unreadable"], source["headers_read"]) == (1, 1, 3)
    bad: list[BadPick] = []
    assert verify(open_shards(str(tmp_path)), bad=bad) == []
    assert [(pick.key, pick.kind) for pick in bad] == [
        *(("1", "missing"), ("../2", "path"), ("img", "missing"), ("4", "format"))
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(8, 8)] * 3, 8), ([(8, 8), (16, 16)], None), ([(8, 16)] * 3, None), ([(8, 8)] * 40 + [(9, 9)], None)],
)
def test_image_size_where_all_are_squares_of_one(sizes: list[tuple[int, int]], expected: int | None, tmp_path: Path):
    samples = [(f"{n:03d}", {"png": image("png", n, *size)}) for n, size in enumerate(sizes)]
    write_tar(tmp_path / "a.tar", samples)
    assert index(tmp_path).manifest.image_size == expected


def test_headers_are_read_of_some_images_all_over_a_shard(tmp_path: Path):
    write_tar(tmp_path / "a.tar", numbered(0, 200))
    write_tar(tmp_path / "b.tar", numbered(0, 65))
    assert index(tmp_path).manifest.source["headers_read"] == 50 + 33


def test_hashes_are_computed_unless_they_are_not_wanted(tmp_path: Path):
    shards(tmp_path, {"a.tar": 3})
    seen: list[tuple[int, int]] = []
    (found,) = index_shards(str(tmp_path), progress=lambda *state: seen.append(state))
    total = (tmp_path / "a.tar").stat().st_size
    assert seen == [(total, total)]
    assert len(found.manifest.shards[0].sha256) == 64
    opened = index(tmp_path, hashes=False)
    assert opened.manifest.shards[0].sha256 == ""
    assert verify(opened) == []
    assert read_all(opened)[2] == []


def test_remote_shards(tmp_path: Path):
    root = f"memory://{tmp_path.name}/shards"
    shards(root, {"a.tar": 5, "b.tar": 6}, cls=word)
    opened = index(root)
    assert opened.manifest.classes == ("ant", "bee", "cow")
    assert opened.urls == (f"{root}/a.tar", f"{root}/b.tar")
    assert len(read_all(opened)[0]) == 11
    assert verify(opened) == []
    elsewhere = index(f"{root}/{{b,a}}.tar", out=str(tmp_path / "m.json"))
    assert elsewhere.manifest.base == root
    assert elsewhere.counts == [6, 5]


def cut(path: Path, number: int) -> None:
    """Cut a shard of PNGs in the middle of an image: the sample before it may then lack members too."""
    content = path.read_bytes()
    starts = [member.offset for member in tar.members(content) if member.name.endswith(".png")]
    path.write_bytes(content[: starts[number] + 50])


def test_damaged_shards_are_named_and_counted_as_far_as_they_are_whole(tmp_path: Path):
    shards(tmp_path, {"a.tar": 5, "b.tar": 6, "c.tar": 7}, txt=word)
    cut(tmp_path / "b.tar", 4)
    damaged = bytearray((tmp_path / "c.tar").read_bytes())
    damaged[damaged.index(b"00000014.png")] ^= 1
    (tmp_path / "c.tar").write_bytes(damaged)
    (found,) = index_shards(str(tmp_path))
    assert found.manifest.counts == [5, 3, 2]
    assert list(found.damaged) == ["b.tar", "c.tar"]
    assert found.damaged["b.tar"].startswith("is cut off")
    assert "damaged at byte" in found.damaged["c.tar"]
    assert not (tmp_path / "manifest.json").exists()
    write_index(found)
    opened = open_shards(str(tmp_path))
    check_shards(opened)
    keys, _, bad = read_all(opened)
    assert (len(keys), bad) == (10, [])
    faults = verify(opened)
    assert [fault.partition(":")[0] for fault in faults] == ["b.tar", "c.tar"]


def test_a_shard_that_was_cut_after_indexing_is_named(tmp_path: Path):
    shards(tmp_path, {"a.tar": 5, "b.tar": 6})
    opened = index(tmp_path)
    cut(tmp_path / "b.tar", 4)
    bad: list[BadPick] = []
    (fault,) = verify(opened, bad=bad)
    assert fault.startswith("b.tar: is cut off: it has ")
    assert [(pick.shard, pick.key, pick.kind) for pick in bad] == [
        ("b.tar", f"#{number}", "truncated") for number in (3, 4, 5)
    ]


def classes_file(tmp_path: Path, text: bytes) -> str:
    (tmp_path / "classes.txt").write_bytes(text)
    return str(tmp_path / "classes.txt")


def test_classes_are_named_by_a_file(tmp_path: Path):
    shards(tmp_path / "d", {"a.tar": 6}, cls=word)
    classes = read_classes(classes_file(tmp_path, b"cow\r\nbee\r\nant\r\ndog\r\n\r\n"))
    opened = index(tmp_path / "d", classes=classes)
    assert opened.manifest.classes == ("cow", "bee", "ant", "dog")
    assert read_all(opened)[1] == [1, 2, 0] * 2
    for text, message in (
        (b"a\nb\na\n", "names 'a' twice"),
        (b"\n", "names no classes"),
        (b"\xff", "no text in UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            read_classes(classes_file(tmp_path, text))


def test_training_and_validation_get_the_same_classes(tmp_path: Path):
    shards(tmp_path / "train", {"a.tar": 30}, txt=word)
    write_tar(tmp_path / "val" / "a.tar", [("0", {"png": image("png"), "txt": b"cow"})])
    index(tmp_path / "train")
    assert index(tmp_path / "val").manifest.label == "none"  # one text is not frequent
    opened = index(tmp_path / "val", classes=classes_of(str(tmp_path / "train")), force=True)
    assert (opened.manifest.label, opened.manifest.classes) == ("txt", ("ant", "bee", "cow"))
    assert read_all(opened)[1] == [2]
    shards(tmp_path / "bare", {"a.tar": 1})
    index(tmp_path / "bare")
    with pytest.raises(UserError, match=r"bare: has no classes; name a manifest that has some"):
        classes_of(str(tmp_path / "bare"))


def test_folders_that_are_indexed_together_share_rule_and_classes(tmp_path: Path):
    shards(tmp_path / "train", {"a.tar": 30}, txt=word)
    write_tar(tmp_path / "val" / "a.tar", [("0", {"png": image("png"), "txt": b"cow"})])
    found = index_shards([str(tmp_path / "train"), str(tmp_path / "val")])
    assert [one.where for one in found] == [f"{tmp_path}/{split}/manifest.json" for split in ("train", "val")]
    assert [one.manifest.classes for one in found] == [("ant", "bee", "cow")] * 2
    assert [one.manifest.source["labelled"] for one in found] == [30, 1]
    (whole,) = index_shards([str(tmp_path / "train"), str(tmp_path / "val")], out=str(tmp_path / "all.json"))
    assert [shard.name for shard in whole.manifest.shards] == ["train/a.tar", "val/a.tar"]
    write_index(whole)
    assert open_shards(str(tmp_path / "all.json")).urls == (f"{tmp_path}/train/a.tar", f"{tmp_path}/val/a.tar")


def test_a_manifest_is_only_replaced_by_force(tmp_path: Path):
    shards(tmp_path, {"a.tar": 2, "b.tar": 3})
    index(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json: is there already; give --force .*--out FILE\.json"):
        index_shards(f"{tmp_path}/a.tar")
    assert index(tmp_path, force=True).counts == [2, 3]
    with pytest.raises(UserError, match=r"is there already"):
        index_shards(str(tmp_path), out=f"{tmp_path}/manifest.json")
    with pytest.raises(UserError, match=r"--out .*/m\.txt: is no name of a manifest; let it end in \.json"):
        index_shards(str(tmp_path), out=f"{tmp_path}/m.txt")


def test_a_secret_never_gets_into_a_manifest(tmp_path: Path):
    root = f"memory://{tmp_path.name}?token=hush"
    write_tar(f"{root}/a.tar", numbered(0, 1))
    assert "hush" not in json.dumps(index_shards(root)[0].manifest.source)
    with pytest.raises(UserError, match=r"token=\*\*\*: the manifest would hold a secret"):
        index_shards(root, out=str(tmp_path / "m.json"))


def test_other_data_is_refused(tmp_path: Path):
    write_tar(tmp_path / "sound" / "a.tar", [("0", {"wav": b"x", "txt": b"hello"})])
    write_tar(tmp_path / "none" / "a.tar", [])
    write_tar(tmp_path / "cut" / "a.tar", numbered(0, 2))
    cut(tmp_path / "cut" / "a.tar", 0)
    zipped = tmp_path / "zip" / "a.tar"
    zipped.parent.mkdir()
    zipped.write_bytes(b"\x1f\x8b" + bytes(2000))
    shutil.copytree(tmp_path / "cut", tmp_path / "gap")
    for spec, message in {
        "sound": r"sound: not one of 1 samples has an image, such as 0 with \.txt, \.wav; images are members that end",
        "none": "none: holds no samples",
        "cut": r"cut: not one whole sample; a\.tar is cut off",
        "zip": r"zip: not one whole sample; a\.tar is compressed",
        "gap/{a,b,c,d,e,f}.tar": r"^5 of 6 shards are missing: .*/b\.tar, .*/c\.tar, .*/d\.tar and 2 more; correct",
    }.items():
        with pytest.raises(UserError, match=message):
            index_shards(f"{tmp_path}/{spec}")


def test_an_empty_shard_among_others_has_no_samples(tmp_path: Path):
    shards(tmp_path, {"a.tar": 2, "b.tar": 0})
    assert index(tmp_path).counts == [2, 0]
    (tmp_path / "c.tar").write_bytes(b"")
    (found,) = index_shards(str(tmp_path), force=True)
    assert found.damaged == {"c.tar": "is cut off (no end mark after 0 bytes)"}


def test_any_number_of_threads_gives_the_same_manifest(tmp_path: Path):
    shards(tmp_path, {f"s-{number}.tar": 1 + number for number in range(12)}, cls=word)

    def manifest(threads: int) -> Indexed:
        return index_shards(str(tmp_path), threads=threads)[0]

    assert manifest(1) == manifest(5)
    assert manifest(1).manifest.counts == list(range(1, 13))


def test_nothing_more_is_begun_after_an_error():
    begun = []

    def call(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise UserError("no such file")
        Event().wait(0.01)

    with pytest.raises(UserError, match="no such file"):
        list(in_threads(call, range(500), 2))
    assert len(begun) < 500


def test_images_that_are_decoded_are_those_that_were_stored(tmp_path: Path):
    write_tar(tmp_path / "a.tar", numbered(0, 9, cls=word))
    fields, keys = next(ImageSource(index(tmp_path), 8).read_shard(0, 9))
    assert keys == [f"{number:08d}" for number in range(9)]
    assert (fields["image"] == np.stack([picture(number) for number in range(9)])).all()
    theirs = read_with_webdataset(tmp_path / "a.tar")
    assert [sample["cls"] for sample in theirs] == [word(number) for number in range(9)]
    assert theirs[3]["png"] in tar_bytes(numbered(3, 1))
    assert storage.size(tmp_path / "manifest.json")
