"""Finding shards: by manifest (`open_shards`), and without one (`list_shards`)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.foreign_shards import shards, write_tar
from vqscale import storage
from vqscale.data.indexing.index import index_shards, write_index
from vqscale.data.indexing.listing import below_one_folder, list_shards
from vqscale.data.manifest import Manifest, parse_manifest, read_manifest, write_manifest
from vqscale.data.shards import check_shards, expand, fixed_folder, is_pattern, open_shards
from vqscale.errors import UserError

NAMES = ("train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar")


def digits(number: int) -> bytes:
    return b"%d" % (number % 2)


def make(root: str | Path, counts: dict[str, int], **how: object) -> None:
    """Shards with a manifest of their own."""
    shards(root, counts, cls=digits)
    for found in index_shards(str(root), **how):  # type: ignore[arg-type]
        write_index(found)


@pytest.fixture(params=["path", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of four shards with 2, 3, 4 and 5 samples, as a path and as URLs."""
    folder = {"path": f"{tmp_path}/d", "file": f"file://{tmp_path}/d", "memory": f"memory://{tmp_path.name}/d"}
    url = folder[request.param]
    make(url, dict(zip(NAMES, (2, 3, 4, 5), strict=True)))
    return url


@pytest.mark.parametrize(
    ("spec", "numbers"),
    [
        ("", [0, 1, 2, 3]),
        ("/", [0, 1, 2, 3]),
        ("/manifest.json", [0, 1, 2, 3]),
        ("/train-001.tar", [1]),
        ("/train-{000..002}.tar", [0, 1, 2]),
        ("/train-{002..000}.tar", [0, 1, 2]),  # a pattern chooses, the manifest orders
        ("/{val-000,train-002}.tar", [2, 3]),
        ("/train-*.tar", [0, 1, 2]),
        ("/*-000.tar", [0, 3]),
        ("/train-00[12].tar", [1, 2]),
        ("/{train,val}-*0.tar", [0, 3]),
        ("//train-000.tar", [0]),
    ],
)
def test_every_way_to_name_shards(root: str, spec: str, numbers: list[int]):
    found = open_shards(f"{root}{spec}")
    assert list(found.urls) == [f"{root}/{NAMES[number]}" for number in numbers]
    assert [found.name(at) for at in range(len(numbers))] == [NAMES[number] for number in numbers]
    assert found.counts == [(2, 3, 4, 5)[number] for number in numbers]
    assert found.labels == ("cls",) * len(numbers)
    assert found.manifest.classes == ("0", "1")
    check_shards(found)


@pytest.mark.parametrize("spec", ["{a,b}.tar", "*.tar", "./{a,b}.tar", ".", "./manifest.json", "manifest.json"])
def test_shards_in_the_working_directory(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make(".", {"a.tar": 1, "b.tar": 2})
    assert open_shards(spec).counts == [1, 2]


def test_lists_are_joined_in_their_order(root: str, tmp_path: Path):
    make(tmp_path / "more", {"train-000.tar": 6})
    found = open_shards([f"{root}/val-*.tar", str(tmp_path / "more"), f"{root}/train-{{000..001}}.tar"])
    assert found.counts == [5, 6, 2, 3]
    assert found.manifest.samples == 16
    names = [found.name(at) for at in range(4)]
    assert names == ["0/val-000.tar", "1/train-000.tar", "2/train-000.tar", "2/train-001.tar"]
    assert found.flat_names == tuple(name.replace("/", "--") for name in names)
    assert found.urls[1] == f"{tmp_path}/more/train-000.tar"
    check_shards(found)
    assert open_shards([root]).spec == root


def test_parts_of_a_list_keep_their_own_label_rules(tmp_path: Path):
    make(tmp_path / "a", {"0.tar": 4})
    shards(tmp_path / "b", {"0.tar": 4}, txt=digits)
    for found in index_shards(str(tmp_path / "b"), label="txt"):
        write_index(found)
    assert open_shards([str(tmp_path / "a"), str(tmp_path / "b")]).labels == ("cls", "txt")


def test_parts_of_a_list_must_agree(root: str, tmp_path: Path):
    make(tmp_path / "more", {"train-000.tar": 6}, label="none")
    with pytest.raises(
        UserError, match=r"more: has other classes than .*; name shards that were packed or indexed alike"
    ):
        open_shards([root, str(tmp_path / "more")])


def test_image_size_of_a_list_is_kept_where_all_share_it(root: str, tmp_path: Path):
    make(tmp_path / "more", {"a.tar": 2})
    assert open_shards([root, str(tmp_path / "more")]).manifest.image_size == 8
    manifest = read_manifest(tmp_path / "more").model_copy(update={"image_size": 16})
    write_manifest(tmp_path / "more", manifest)
    assert open_shards([root, str(tmp_path / "more")]).manifest.image_size is None


def test_folders_below_the_manifest(tmp_path: Path):
    for split in ("train", "val"):
        shards(tmp_path / split, {"000.tar": 2, "001.tar": 3}, cls=digits)
    (found,) = index_shards(f"{tmp_path}/*/*.tar")
    write_index(found)
    assert found.where == f"{tmp_path}/manifest.json"
    assert [shard.name for shard in found.manifest.shards] == [
        *("train/000.tar", "train/001.tar", "val/000.tar", "val/001.tar")
    ]
    assert open_shards(f"{tmp_path}/*/001.tar").urls == (f"{tmp_path}/train/001.tar", f"{tmp_path}/val/001.tar")
    assert open_shards(f"{tmp_path}/v*/*.tar").counts == [2, 3]
    with pytest.raises(UserError, match="fits no shard of the manifest"):
        open_shards(f"{tmp_path}/*.tar")  # a star stays within one folder


def test_a_pattern_over_folders_that_have_a_manifest_each(tmp_path: Path):
    for part in ("a", "b"):
        make(tmp_path / part, {"0.tar": 2, "1.tar": 3})
    found = open_shards(f"{tmp_path}/{{b,a}}/1.tar")
    assert found.urls == (f"{tmp_path}/b/1.tar", f"{tmp_path}/a/1.tar")
    assert found.manifest.samples == 6


def test_a_manifest_elsewhere_points_to_its_shards(root: str, tmp_path: Path):
    place = tmp_path / "lists" / "train.json"
    (found,) = index_shards(f"{root}/train-*.tar", out=str(place))
    write_index(found)
    assert found.manifest.base == root
    opened = open_shards(str(place))
    assert opened.counts == [2, 3, 4]
    check_shards(opened)


def test_a_manifest_beside_its_shards_moves_with_them(tmp_path: Path):
    shards(tmp_path / "old", {"a.tar": 2})
    (found,) = index_shards(f"{tmp_path}/old", out=f"{tmp_path}/old/train.json")
    assert found.manifest.base == ""
    write_index(found)
    (tmp_path / "old").rename(tmp_path / "new")
    check_shards(open_shards(f"{tmp_path}/new/train.json"))


def test_a_folder_may_have_signs_of_patterns_in_its_name(tmp_path: Path):
    make(tmp_path / "odd [1] {x}.tar", {"a.tar": 2})
    assert open_shards(f"{tmp_path}/odd [1] {{x}}.tar").counts == [2]


def test_every_fault_has_its_own_line(tmp_path: Path):
    make(tmp_path / "d", {"a.tar": 2, "b.tar": 2})
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "bare" / "a.tar", [])
    for spec, message in {
        "d/c.tar": r"d/c\.tar is not in the manifest; correct the pattern, or list all shards",
        "d/{a..d}.tar": r"d/c\.tar is not in the manifest",
        "d/x*.tar": r"fits no shard of the manifest; correct the pattern",
        "d/{a.tar": r"has unbalanced braces; write \{000\.\.099\} or \{a,b\}",
        "bare/a.tar": r"no manifest\.json in .*/bare says what these shards hold; make one: vqscale data index '",
        "{bare,d}/a.tar": r"no manifest\.json in .* says what these shards hold",
        "bare": r"holds shards, but no manifest\.json",
        "empty": "is an empty folder",
        "none": "no such folder",
        "none/*.tar": "no such folder",
        "none.json": "no such file",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            open_shards(f"{tmp_path}/{spec}")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"is a command, not a place; name a URL that fsspec knows"):
        open_shards("pipe:cat a.tar")
    with pytest.raises(UserError, match="names no shards"):
        open_shards([])


def test_missing_and_short_shards_are_named(root: str):
    found = open_shards(root)
    where = f"{root}/train-001.tar"
    content = storage.read_bytes(where)
    storage.write_bytes(where, content[:-512])
    with pytest.raises(UserError, match=rf"train-001\.tar: shard has {len(content) - 512} bytes, its manifest says"):
        check_shards(found)
    storage.remove(where)
    with pytest.raises(UserError, match=r"train-001\.tar: shard is missing"):
        check_shards(found)


def test_patterns_are_told_from_folders():
    assert all(map(is_pattern, ("a/*.tar", "a/{1..2}.tar", "a.tar", "s3://b/[ab]/x.tar", "{a,b}")))
    assert not any(map(is_pattern, ("a", "s3://b/c", "a/m.json", "https://h/d?x=1")))
    assert fixed_folder("a/b/{0..1}/*.tar") == "a/b"
    assert fixed_folder("s3://b/c/*.tar") == "s3://b/c"
    assert fixed_folder("*.tar") == "."
    assert fixed_folder("/{a,b}.tar") == "/"
    assert expand("{00..02}-{x,y}") == ["00-x", "00-y", "01-x", "01-y", "02-x", "02-y"]


def listed(*specs: str) -> list[tuple[str, list[str]]]:
    return [(part.folder, list(part.names)) for part in list_shards(specs)]


def test_listing_sorts_by_name_and_keeps_the_order_of_braces(tmp_path: Path):
    for name in ("s-2.tar", "s-10.tar", "s-1.tar", ".hidden.tar", "note.txt", "sub/s-3.tar"):
        write_tar(tmp_path / name, [])
    d = str(tmp_path)
    assert listed(d) == [(d, ["s-1.tar", "s-2.tar", "s-10.tar"])]
    assert listed(f"{d}/*.tar") == [(d, ["s-1.tar", "s-2.tar", "s-10.tar"])]
    assert listed(f"{d}/s-{{10,2,1}}.tar") == [(d, ["s-10.tar", "s-2.tar", "s-1.tar"])]
    assert listed(f"{d}/s-[12]*.tar") == [(d, ["s-1.tar", "s-2.tar", "s-10.tar"])]
    assert listed(f"{d}/*/s-{{1..3}}.tar") == [(d, ["sub/s-3.tar"])]
    assert listed(f"{d}/s-2.tar", f"{d}//s-1.tar", f"{d}/s-2.tar") == [(d, ["s-2.tar", "s-1.tar"])]
    assert listed(f"{d}/sub", d) == [(f"{d}/sub", ["s-3.tar"]), (d, ["s-1.tar", "s-2.tar", "s-10.tar"])]


def test_listing_needs_shards_that_can_be_read_at_random(tmp_path: Path):
    (tmp_path / "gz").mkdir()
    (tmp_path / "gz" / "a.tar.gz").write_bytes(b"")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_bytes(b"")
    for spec, message in {
        "gz": r"a\.tar\.gz: is a compressed tar, which cannot be read at random; unpack it .*vqscale data pack",
        "x.tgz": "is a compressed tar",
        "{0..9}.tar.gz": "is a compressed tar",
        "text": r"holds no \.tar; name the folder of the shards, or a pattern such as",
        "none": "no such folder",
        "text/*.tar": "fits no shard; check the pattern",
        "m.json": "is a manifest, not shards",
        "{a.tar": "unbalanced braces",
    }.items():
        with pytest.raises(UserError, match=message):
            list_shards([f"{tmp_path}/{spec}"])


def test_several_folders_below_one(tmp_path: Path):
    for name in ("a/x/0.tar", "a/y/0.tar"):
        write_tar(tmp_path / name, [])
    whole = below_one_folder(list_shards([f"{tmp_path}/a/x", os.path.relpath(tmp_path / "a" / "y")]))
    assert whole == (f"{tmp_path}/a", ("x/0.tar", "y/0.tar"))
    write_tar("memory://one/0.tar", [])
    write_tar("memory://one/two/0.tar", [])
    assert below_one_folder(list_shards(["memory://one/two", "memory://one"])).names == ("two/0.tar", "0.tar")
    with pytest.raises(UserError, match="one manifest cannot list"):
        below_one_folder(list_shards(["memory://one", f"{tmp_path}/a/x"]))


def test_old_manifests_still_mean_what_they_meant(tmp_path: Path):
    (tmp_path / "manifest.json").write_text(
        '{"format": "vqscale-images/1", "shards": [{"name": "a.tar", "samples": 1, "bytes": 9, "sha256": "00"}]}'
    )
    manifest = parse_manifest(f"{tmp_path}/manifest.json")
    assert isinstance(manifest, Manifest)
    assert (manifest.base, manifest.label) == ("", "")
    assert open_shards(str(tmp_path)).urls == (f"{tmp_path}/a.tar",)
