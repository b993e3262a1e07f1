import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import zstandard

from vqscale.data import tar
from vqscale.data.code_planes import pack_codes, unpack_codes
from vqscale.data.code_records import CodeRecord, manifest_from_records, read_record, read_records, write_record
from vqscale.data.code_source import CodeSource
from vqscale.data.codes import (
    CodeBlock,
    OpenCodes,
    empty_fields,
    read_code_shard,
    write_code_shard,
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
        shard = write_code_shard(f"{root}/c{place}.tar", blocks(first, count), LEVELS, "abc")
        write_record(str(root), CodeRecord(shard=shard, fingerprint="abc", usage={"top": [1] * 64}))
        names.append(shard.name)
        first += count
    records = read_records(str(root), names, "abc")
    manifest = manifest_from_records(records, levels=LEVELS, classes=(), image_size=8, fingerprint="abc", source={})
    write_manifest(root, manifest)
    return manifest


def test_round_trip_and_same_bytes(tmp_path: Path):
    first = write_code_shard(f"{tmp_path}/a.tar", blocks(0, 25), LEVELS, "abc")
    second = write_code_shard(f"{tmp_path}/b.tar", blocks(0, 25), LEVELS, "abc")
    assert first.sha256 == second.sha256
    assert first.samples == 25
    fields = read_code_shard(f"{tmp_path}/a.tar")
    assert fields["bottom"].dtype == np.uint16
    assert (fields["bottom"][:, 0, 0] == np.arange(25) + 65_000).all()
    assert (fields["label"] == np.arange(25)).all()


@pytest.mark.parametrize("size", [2, 16, 256, 257, 512, 1_000, 4_096, 16_384, 65_536])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_packed_codes_come_back(size: int, count: int):
    codes = np.random.default_rng(size).integers(0, size, (count, 5, 5))
    codes[0, 0, :2] = 0, size - 1
    packed = pack_codes(codes, size)
    bits = max(8, (size - 1).bit_length())
    assert len(packed) == codes.size + (bits - 8) * -(-codes.size // 8)
    out = np.full(codes.shape, 12_345, np.uint16)
    unpack_codes(packed, size, out)
    assert (out == codes).all()
    with pytest.raises(ValueError, match="do not hold"):
        unpack_codes(packed[:-1], size, out)


def test_codes_that_do_not_compress_take_their_bits(tmp_path: Path):
    """Nine bits of 16 for 512 codes, also where every code is as likely as any other."""
    level = CodeLevel(name="bottom", grid=64, codes=512)
    codes = np.random.default_rng(0).integers(0, 512, (300, 64, 64))
    block = CodeBlock({"bottom": codes}, np.zeros(300, np.int64), [f"{n:06d}" for n in range(300)])
    written = write_code_shard(f"{tmp_path}/a.tar", [block], [level], "abc")
    assert written.bytes < 1.01 * 9 / 16 * 2 * codes.size
    fewer = replace(block, codes={"bottom": codes % 128})
    assert write_code_shard(f"{tmp_path}/b.tar", [fewer], [level], "abc").bytes < 0.85 * written.bytes


def test_webdataset_reads_the_blocks(tmp_path: Path):
    import webdataset

    write_code_shard(f"{tmp_path}/a.tar", blocks(0, 25), LEVELS, "abc")
    found = list(webdataset.WebDataset(f"{tmp_path}/a.tar", shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["00000", "00001", "00002"]
    keys = [json.loads(zstandard.decompress(sample["keys.zst"])) for sample in found]
    assert [len(part) for part in keys] == [10, 10, 5]
    assert zstandard.decompress(found[2]["top.zst"]) == np.arange(20, 25, dtype=np.uint8).repeat(4).tobytes()


def test_blocks_can_be_read_by_the_index_alone(tmp_path: Path):
    path = tmp_path / "a.tar"
    write_code_shard(path, blocks(0, 25), LEVELS, "abc")
    shard = OpenCodes(path.read_bytes(), str(path))
    assert (shard.index.samples, shard.index.fingerprint, shard.index.levels) == (25, "abc", LEVELS)
    out = empty_fields(LEVELS, 5)
    shard.read_block(shard.index.blocks[2], out)
    assert (out["label"] == np.arange(20, 25)).all()
    assert (out["bottom"][:, 1, 2] == np.arange(20, 25) + 65_000).all()
    assert shard.block_keys(shard.index.blocks[1])[0] == "0010"
    assert (shard.labels() == np.arange(25)).all()


def test_codes_must_fit(tmp_path: Path):
    (good,) = blocks(0, 3)
    wide = replace(good, codes={**good.codes, "top": np.full((3, 2, 2), 64)})
    with pytest.raises(UserError, match="codes of top lie outside 0 to 63"):
        write_code_shard(f"{tmp_path}/a.tar", [wide], LEVELS, "abc")
    for unlike in (replace(good, labels=np.zeros(2)), replace(good, keys=["a"])):
        with pytest.raises(UserError, match="differ in number"):
            write_code_shard(f"{tmp_path}/a.tar", [unlike], LEVELS, "abc")
    assert not list(tmp_path.iterdir())


def read_all(path: Path) -> None:
    opened = OpenCodes(path.read_bytes(), str(path))
    opened.read(empty_fields(LEVELS, 25), 0)
    opened.read_keys()


def test_every_flipped_byte_is_noticed(tmp_path: Path):
    """By the tar's, the index's or the frames' own means, without the manifest's hash."""
    path = tmp_path / "a.tar"
    write_code_shard(path, blocks(0, 25), LEVELS, "abc")
    content = path.read_bytes()
    shard = OpenCodes(content, "a.tar")
    begin = content.index(b"00000.bottom.zst") // 512 * 512
    for block in shard.index.blocks:
        for offset, size in block.members.values():
            for place in (begin + offset, begin + offset + size // 2, begin + offset + size - 1):
                damaged = bytearray(content)
                damaged[place] ^= 0x10
                path.write_bytes(damaged)
                with pytest.raises(UserError, match=r"a\.tar: is damaged") as caught:
                    read_all(path)
                assert len(str(caught.value).splitlines()) == 1


def test_a_cut_shard_and_another_format_are_one_line(tmp_path: Path):
    path = tmp_path / "a.tar"
    write_code_shard(path, blocks(0, 25), LEVELS, "abc")
    content = path.read_bytes()
    for length in (0, 100, 512, 1_500, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"a\.tar: (is cut off|is damaged)"):
            read_code_shard(path)
    with (tmp_path / "b.tar").open("wb") as file:
        tar.write(file, [("00000", {"top.npy": b"x"})])
    with pytest.raises(UserError, match=r"b\.tar: is no code shard of format vqscale-codes/1"):
        read_code_shard(tmp_path / "b.tar")


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
    other = manifest.model_copy(update={"fingerprint": "other"})
    for wrong, what in ((wide, "other levels"), (other, "codes of another tokenizer")):
        with pytest.raises(UserError, match=rf"c0\.tar: holds {what}"):
            CodeSource(replace(open_shards(str(tmp_path)), manifest=wrong)).open_group([0])
    with pytest.raises(UserError, match="no such file"):
        read_code_shard(f"{tmp_path}/none.tar")
