"""Copies of code shards: whole or refused, however often they are stopped, between any two places."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from pipelines.codes import main
from tests.object_store import ObjectStore
from tests.test_data_codes import extracted
from tests.training_helpers import code_shards
from vqscale import storage
from vqscale.data.codes import read_code_shard
from vqscale.data.copying import choose, copy_codes, open_codes
from vqscale.data.manifest import read_manifest
from vqscale.errors import UserError

pytest_plugins = ("tests.object_store",)

COUNTS = [12, 30, 21, 17, 5, 9]


@pytest.fixture
def codes(tmp_path: Path) -> Path:
    """A folder of six code shards."""
    extracted(tmp_path / "codes", COUNTS)
    return tmp_path / "codes"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which a command ends that is given bad input."""
    assert main([str(word) for word in words]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if not text.startswith(("copying", "verifying"))]
    assert line.startswith("error: ")
    return line


def edit_manifest(folder: Path, old: str, new: str) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_copy_is_equal_in_every_byte(codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", str(codes), str(tmp_path / "copy"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert (found["shards"], found["samples"], found["copied_shards"]) == (6, sum(COUNTS), 6)
    assert contents(tmp_path / "copy") == contents(codes)
    assert main(["pull", str(codes), str(tmp_path / "copy")]) == 0
    shown = capsys.readouterr()
    assert "0 shards were copied (0.0 MB), the others were there" in shown.out
    assert "copying: " in shown.err
    assert main(["verify", str(tmp_path / "copy")]) == 0


def die_at(call: int, source: Path, target: Path) -> None:
    """In a process of its own: copy, and die without a trace at so many writes, each second time half-way through."""
    write, calls = storage.write_bytes, 0

    def dying(url: str | Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            path = Path(url)
            path.with_name(f".{path.name}.{os.getpid()}").write_bytes(data[: len(data) // 2])
            os._exit(9)
        write(url, data)

    storage.write_bytes = dying  # type: ignore[assignment]
    shards = open_codes(str(source))
    copy_codes(shards, str(target), range(len(shards.urls)), threads=1)


@pytest.mark.fault
def test_killed_ten_times_it_still_completes(codes: Path, tmp_path: Path) -> None:
    """At writes of shards, of records, and of the manifest, each time later than the last."""
    target, shards = tmp_path / "copy", open_codes(str(codes))
    target.mkdir()
    for number in range(10):
        process = multiprocessing.get_context("fork").Process(target=die_at, args=(1 + number % 3, codes, target))
        process.start()
        process.join(60)
        assert process.exitcode == 9
        assert not (target / "manifest.json").exists()
    done = copy_codes(shards, str(target), range(6))
    assert 0 < done.shards < 6
    assert contents(target) == contents(codes)


def test_only_what_is_asked_for_and_later_the_rest(codes: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    assert main(["pull", str(codes), str(target), "--shards", "1-2,4"]) == 0
    assert [shard.name for shard in read_manifest(target).shards] == ["c1.tar", "c2.tar", "c4.tar"]
    assert sorted(path.name for path in target.glob("*.tar")) == ["c1.tar", "c2.tar", "c4.tar"]
    assert main(["pull", str(codes), str(target), "--fraction", "0.2"]) == 0
    assert [shard.name for shard in read_manifest(target).shards] == ["c0.tar", "c1.tar", "c2.tar", "c4.tar"]
    assert main(["verify", str(target)]) == 0
    assert main(["pull", str(codes), str(target)]) == 0
    assert contents(target) == contents(codes)


def test_numbers_of_shards() -> None:
    assert choose(7) == [0, 1, 2, 3, 4, 5, 6]
    assert choose(7, ranges="5,0-2, 1") == [0, 1, 2, 5]
    assert choose(7, fraction=0.3) == [0, 1, 2]
    for ranges in ("7", "3-1", "x", "-1", "0-7", "1-", ","):
        with pytest.raises(UserError, match=r"--shards: .* names no shards"):
            choose(7, ranges=ranges)
    for fraction in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(UserError, match="--fraction"):
            choose(7, fraction=fraction)


def test_both_splits_at_once_and_held_out_ones_whole(tmp_path: Path) -> None:
    for split, counts in (("train", COUNTS), ("validation", [8, 8])):
        extracted(tmp_path / "codes" / split, counts)
    assert main(["pull", str(tmp_path / "codes"), str(tmp_path / "copy"), "--fraction", "0.5"]) == 0
    assert len(read_manifest(tmp_path / "copy" / "train").shards) == 3
    assert len(read_manifest(tmp_path / "copy" / "validation").shards) == 2


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_there_and_back(codes: Path, tmp_path: Path, object_store: ObjectStore, scheme: str) -> None:
    there = object_store.url("codes") if scheme == "s3" else f"memory://{tmp_path.name}/codes"
    assert main(["push", str(codes), there]) == 0
    assert main(["push", str(codes), there]) == 0
    assert main(["verify", there]) == 0
    assert main(["pull", there, str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(codes)


def test_a_fault_of_the_storage_is_read_past(codes: Path, tmp_path: Path, object_store: ObjectStore) -> None:
    """A shard that arrives wrong once is read again; one that stays wrong is refused and leaves nothing."""
    there = object_store.url("codes")
    main(["push", str(codes), there])
    whole = (codes / "c1.tar").read_bytes()
    object_store.put("codes/c1.tar", whole[:900] + b"!" + whole[901:])
    shards = open_codes(there)
    with pytest.raises(UserError, match=r"c1\.tar: its content has another sha256"):
        copy_codes(shards, str(tmp_path / "copy"), range(6), threads=1)
    assert not {"c1.tar", "c1.tar.json", "manifest.json"} & {path.name for path in (tmp_path / "copy").iterdir()}
    object_store.put("codes/c1.tar", whole)
    copy_codes(shards, str(tmp_path / "copy"), range(6))
    assert contents(tmp_path / "copy") == contents(codes)


@pytest.mark.fault
@pytest.mark.parametrize("command", ["pull", "verify"])
def test_damaged_shards_are_one_line(
    codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path, target = codes / "c2.tar", tmp_path / "copy"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content, what in ((bytes(flipped), "another sha256"), (whole[:-700], "is cut off")):
        path.write_bytes(content)
        if command == "verify":
            assert main(["verify", str(codes), "--json"]) == 1
            (found,) = json.loads(capsys.readouterr().out).values()
            assert [what in fault for fault in found["faults"]] == [True]
            continue
        line = refused(capsys, "pull", codes, target)
        assert "c2.tar: " in line
        assert what in line
        assert not (target / "c2.tar").exists()
        assert not (target / "manifest.json").exists()


@pytest.mark.parametrize("name", ["../c0.tar", "a/../../c0.tar", "/c0.tar", "a//c0.tar", "..\\\\c0.tar", "s3:c0.tar"])
def test_names_that_leave_the_target_are_refused(
    codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    edit_manifest(codes, '"c0.tar"', f'"{name}"')
    before = contents(tmp_path)
    assert "leaves the manifest's folder" in refused(capsys, "pull", codes, tmp_path / "deep" / "copy")
    assert contents(tmp_path) == before


def test_wrong_fingerprints_are_refused(codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a shard that is not of its manifest, and in a target that holds another tokenizer's codes."""
    target = tmp_path / "copy"
    assert main(["pull", str(codes), str(target), "--shards", "0"]) == 0
    edit_manifest(codes, '"abc"', '"another"')
    capsys.readouterr()
    assert "holds codes of another tokenizer" in refused(capsys, "pull", codes, target)
    line = refused(capsys, "pull", codes, tmp_path / "new")
    assert ".tar: holds codes of another tokenizer than its manifest says" in line
    assert not (tmp_path / "new").exists()
    assert main(["verify", str(codes)]) == 1


def test_targets_with_other_codes_are_refused(codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extracted(tmp_path / "other", [3, 4])
    assert "holds other codes (c0.tar)" in refused(capsys, "pull", codes, tmp_path / "other")
    assert "is where the shards are" in refused(capsys, "push", codes, f"{codes}/")
    code_shards(tmp_path / "tiny", shards=2, samples=3)
    assert "another tokenizer" in refused(capsys, "pull", tmp_path / "tiny", codes)
    assert "no such folder" in refused(capsys, "pull", tmp_path / "none", tmp_path / "new")


def test_a_local_shard_that_was_damaged_after_its_copy_is_copied_again(codes: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    main(["pull", str(codes), str(target)])
    content = (target / "c3.tar").read_bytes()
    (target / "c3.tar").write_bytes(content[:600] + b"!" + content[601:])
    main(["pull", str(codes), str(target)])
    assert contents(target) == contents(codes)


def test_show_says_what_is_in_it(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(codes)]) == 0
    shown = capsys.readouterr().out
    assert f"{sum(COUNTS)} code grids of 8×8 images, 6 shards" in shown
    for text in ("format: vqscale-codes/1", "tokenizer: abc", "level top: 2×2 of 64 codes", "first keys: 0000, 0001"):
        assert text in shown
    assert main(["show", str(codes), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out).values()
    assert found["class_counts"] == {f"label {number}": 1 for number in range(sum(COUNTS))}
    assert found["levels"][1] == {"name": "top", "grid": 2, "codes": 64}


def test_show_wants_both_options_or_none(codes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give both, or neither" in refused(capsys, "show", codes, "--out", "sheet.png")
    assert "make no sheet" in refused(capsys, "show", codes, "--samples", "0")


def test_copied_shards_hold_the_codes(codes: Path, tmp_path: Path) -> None:
    main(["pull", str(codes), str(tmp_path / "copy")])
    for path in codes.glob("*.tar"):
        ours, theirs = read_code_shard(path), read_code_shard(tmp_path / "copy" / path.name)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
