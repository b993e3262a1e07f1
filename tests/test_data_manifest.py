import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.data_helpers import image_shards
from vqscale import storage
from vqscale.data.manifest import Shard, check_streams, deal, read_manifest, write_manifest
from vqscale.data.shards import open_shards
from vqscale.data.verify import verify
from vqscale.errors import UserError


@pytest.fixture
def packed(tmp_path: Path) -> str:
    image_shards(tmp_path, [5, 7])
    return str(tmp_path)


def test_round_trip_locally_and_in_memory(packed: str):
    manifest = read_manifest(packed)
    assert manifest.samples == 12
    assert manifest.counts == [5, 7]
    write_manifest("memory://some/where", manifest)
    assert read_manifest("memory://some/where") == manifest


def test_each_missing_thing_has_its_own_line(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        read_manifest(tmp_path / "none")
    with pytest.raises(UserError, match="empty folder"):
        read_manifest(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"name .*/train"):
        read_manifest(tmp_path)
    (tmp_path / "train" / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        read_manifest(tmp_path / "train")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no valid manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.tar", "a/../b.tar", "a//b.tar", "a/", "", ".", "..", "/etc/passwd", "a\\b.tar", "s3://b/a.tar"]
)
def test_shard_names_stay_inside(name: str):
    with pytest.raises(ValidationError):
        Shard(name=name, samples=1, bytes=1, sha256="")


def test_shards_may_lie_in_folders():
    assert Shard(name="train/a.tar", samples=1, bytes=1, sha256="").name == "train/a.tar"


@pytest.mark.parametrize("rule", ["", "none", "cls", "txt", "folder", "folder:2", "json:label", "json:a b:c"])
def test_label_rules(rule: str, packed: str):
    manifest = read_manifest(packed).model_copy(update={"label": rule})
    write_manifest(packed, manifest)
    assert read_manifest(packed).label == rule
    write_manifest(packed, manifest.model_copy(update={"label": f"x{rule}"}))
    with pytest.raises(UserError, match=r"is no valid manifest \(label: "):
        read_manifest(packed)


def test_verify_finds_every_fault(tmp_path: Path):
    manifest = image_shards(tmp_path, [5, 7, 3, 4, 6, 2])
    seen: list[Shard] = []
    assert verify(open_shards(str(tmp_path)), seen.append) == []
    assert seen == list(manifest.shards)
    content = bytearray((tmp_path / "s0.tar").read_bytes())
    content[600] ^= 1
    (tmp_path / "s0.tar").write_bytes(content)
    (tmp_path / "s2.tar").write_bytes((tmp_path / "s2.tar").read_bytes()[:2000])
    (tmp_path / "s3.tar").unlink()
    with (tmp_path / "s4.tar").open("ab") as file:
        file.write(b"more")
    shards = list(manifest.shards)
    shards[1] = shards[1].model_copy(update={"samples": 9})
    write_manifest(tmp_path, manifest.model_copy(update={"shards": tuple(shards)}))
    faults = verify(open_shards(str(tmp_path)), threads=2)
    assert [fault.partition(":")[0] for fault in faults] == ["s0.tar", "s1.tar", "s2.tar", "s3.tar", "s4.tar"]
    assert "sha256" in faults[0]
    assert "holds 7 samples, the manifest says 9" in faults[1]
    assert "is cut off: it has 2000 bytes, the manifest says" in faults[2]
    assert "is missing" in faults[3]
    assert "bytes, the manifest says" in faults[4]


def test_streams_need_enough_samples():
    check_streams([20, 20, 20], streams=3, packet=16)
    with pytest.raises(UserError, match=r"3 shards cannot feed 4 streams.*data\.streams"):
        check_streams([20, 20, 20, 0], streams=4, packet=1)
    with pytest.raises(UserError, match=r"only 5 samples.*data\.packet"):
        check_streams([20, 20, 5], streams=3, packet=16)
    check_streams([20] * 12 + [5], streams=3, packet=16)


def test_deal_balances():
    counts = [10, 10, 10, 5, 5]
    assert sorted(sum(counts[s] for s in part) for part in deal(range(5), counts, 2)) == [20, 20]
    assert [len(part) for part in deal(range(6), [3] * 6, 3)] == [2, 2, 2]


def test_light_imports():
    """The launcher uses these modules, so they bring nothing heavy."""
    code = (
        "import sys, vqscale.config.inputs, vqscale.data.manifest, vqscale.data.shards\n"
        "print([m for m in ('numpy', 'torch', 'webdataset', 'fsspec', 'PIL') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_loading_brings_no_torch():
    code = (
        "import sys, vqscale.data.loader, vqscale.data.images, vqscale.data.codes, vqscale.data.pack\n"
        "print([m for m in ('torch', 'webdataset') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_storage_by_url(tmp_path: Path):
    for root in (str(tmp_path), f"file://{tmp_path}/more", "memory://room"):
        where = storage.join(root, "a", "b.bin")
        assert storage.size(where) is None
        storage.write_bytes(where, b"hello")
        assert storage.size(where) == 5
        assert storage.read_bytes(where) == b"hello" == storage.open_shard(where)[:]
        assert storage.list_names(storage.join(root, "a")) == ["b.bin"]
        storage.remove(where)
        assert storage.size(where) is None
        with pytest.raises(UserError, match="no such file"):
            storage.read_bytes(where)
    with pytest.raises(UserError, match="cannot be reached"):
        storage.size("nosuchscheme://x/y")
