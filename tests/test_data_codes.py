from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from vqscale.data.codes import (
    CodeBlock,
    CodeRecord,
    CodeSource,
    manifest_from_records,
    read_code_shard,
    read_record,
    read_records,
    write_code_shard,
    write_record,
)
from vqscale.data.loader import Loader
from vqscale.data.manifest import CodeLevel, Manifest, write_manifest
from vqscale.data.order import StreamOrder
from vqscale.data.reader import EvaluationReader
from vqscale.data.shards import open_shards
from vqscale.data.verify import verify
from vqscale.errors import UserError

LEVELS = (CodeLevel(name="bottom", grid=4, codes=65_536), CodeLevel(name="top", grid=2, codes=64))


def blocks(first: int, count: int, size: int = 10) -> list[CodeBlock]:
    found = []
    for start in range(first, first + count, size):
        numbers = np.arange(start, min(first + count, start + size))
        bottom = (numbers[:, None, None] + np.zeros((1, 4, 4), np.int64)) + 65_000
        top = np.broadcast_to(numbers[:, None, None] % 64, (len(numbers), 2, 2))
        found.append(CodeBlock({"bottom": bottom, "top": top}, numbers, [f"{n:04d}" for n in numbers]))
    return found


def extracted(root: Path, counts: list[int]) -> Manifest:
    first, names = 0, []
    for place, count in enumerate(counts):
        shard = write_code_shard(f"{root}/c{place}.tar", blocks(first, count))
        write_record(str(root), CodeRecord(shard=shard, fingerprint="abc", usage={"top": [1] * 64}))
        names.append(shard.name)
        first += count
    records = read_records(str(root), names, "abc")
    manifest = manifest_from_records(records, levels=LEVELS, classes=(), image_size=8, fingerprint="abc", source={})
    write_manifest(root, manifest)
    return manifest


def test_round_trip_and_same_bytes(tmp_path: Path):
    first = write_code_shard(f"{tmp_path}/a.tar", blocks(0, 25))
    second = write_code_shard(f"{tmp_path}/b.tar", blocks(0, 25))
    assert first.sha256 == second.sha256
    assert first.samples == 25
    fields = read_code_shard(f"{tmp_path}/a.tar")
    assert fields["bottom"].dtype == np.uint16
    assert (fields["bottom"][:, 0, 0] == np.arange(25) + 65_000).all()
    assert (fields["label"] == np.arange(25)).all()


def test_webdataset_reads_the_blocks(tmp_path: Path):
    import webdataset

    write_code_shard(f"{tmp_path}/a.tar", blocks(0, 25))
    found = list(webdataset.WebDataset(f"{tmp_path}/a.tar", shardshuffle=False).decode())
    assert [len(sample["keys.json"]) for sample in found] == [10, 10, 5]
    assert found[2]["top.npy"].shape == (5, 2, 2)


def test_codes_must_fit(tmp_path: Path):
    block = CodeBlock({"top": np.full((1, 2, 2), 65_536)}, np.zeros(1), ["a"])
    with pytest.raises(UserError, match="65,535"):
        write_code_shard(f"{tmp_path}/a.tar", [block])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="differ in number"):
        write_code_shard(f"{tmp_path}/a.tar", [CodeBlock({"top": np.zeros((2, 2, 2))}, np.zeros(1), ["a"])])


def test_records_say_what_is_finished(tmp_path: Path):
    manifest = extracted(tmp_path, [12, 30])
    assert manifest.samples == 42
    assert verify(open_shards(str(tmp_path))) == []
    folder = str(tmp_path)
    record = read_record(folder, "c1.tar", "abc")
    assert record is not None
    assert record.usage["top"] == [1] * 64
    assert read_record(folder, "c1.tar", "other tokenizer") is None
    assert read_record(folder, "c9.tar", "abc") is None
    (tmp_path / "c1.tar").write_bytes(b"cut")
    assert read_record(folder, "c1.tar", "abc") is None
    with pytest.raises(UserError, match=r"c1\.tar: code shard is not finished"):
        read_records(folder, ["c0.tar", "c1.tar"], "abc")


def test_loads_like_images(tmp_path: Path):
    manifest = extracted(tmp_path, [12, 30, 21, 17])
    source = CodeSource(open_shards(str(tmp_path)))
    order = StreamOrder(manifest.counts, seed=0, streams=2, packet=4, shuffle=20)
    with Loader(source, order, rank=0, world=1, global_batch=16, threads=2) as loader:
        for batch in islice(loader, 12):
            label = batch.fields["label"]
            assert batch.fields["bottom"].shape == (16, 4, 4)
            assert (batch.fields["bottom"][:, 3, 3] == label + 65_000).all()
            assert (batch.fields["top"][:, 0, 1] == label % 64).all()
    seen = [i for r in range(2) for b in EvaluationReader(source, manifest.counts, r, 2, 9) for i in b.fields["label"]]
    assert sorted(seen) == list(range(80))
    fields, keys = next(source.read_shard(1, 5))
    assert keys == ["0012", "0013", "0014", "0015", "0016"]
    assert (fields["label"] == np.arange(12, 17)).all()


def test_wrong_shards_are_refused(tmp_path: Path):
    manifest = extracted(tmp_path, [12])
    wide = manifest.model_copy(update={"levels": (LEVELS[0].model_copy(update={"grid": 8}), LEVELS[1])})
    with pytest.raises(UserError, match=r"c0\.tar: its arrays differ"):
        CodeSource(replace(open_shards(str(tmp_path)), manifest=wide)).open_group([0])
    with pytest.raises(UserError, match="no such file"):
        read_code_shard(f"{tmp_path}/none.tar")
