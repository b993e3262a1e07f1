"""Files that someone has prepared: nothing in them is executed, believed, or allowed to take all memory."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from tests.checkpoint_helpers import keeper, save, tensors, zeros
from tests.training_helpers import Kept, one_process
from vqscale.checkpoint import header
from vqscale.checkpoint.folder import find_fault
from vqscale.checkpoint.manifest import ITEM_BYTES, FaultError, Manifest, parse
from vqscale.training.checkpoints.held import DTYPES

pytestmark = pytest.mark.fault

ROOT = Path(__file__).resolve().parents[1]
FILE = "rank-00000.safetensors"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkpoint of step 3."""
    with one_process(monkeypatch):
        save(tmp_path, 3)
        yield tmp_path / "step-00000003"


def resign(stored: Path, change: Callable[[dict[str, Any]], None] = lambda tree: None) -> None:
    """Change the manifest as someone would who knows how its hashes are made."""
    tree = json.loads((stored / "manifest.json").read_bytes())
    for name, record in tree["files"].items():
        content = (stored / name).read_bytes()
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(tree)
    tree.pop("sha256")
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    text = json.dumps({"sha256": digest, **tree}, indent=1, sort_keys=True) + "\n"
    (stored / "manifest.json").write_text(text)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code from a checkpoint was executed",)


@pytest.mark.parametrize("name", [FILE, "manifest.json", "state.json"])
def test_a_pickle_is_refused(name: str, stored: Path) -> None:
    for content in (pickle.dumps(Bomb()), pickle.dumps(Bomb(), protocol=0)):
        (stored / name).write_bytes(content)
        if name != "manifest.json":
            resign(stored)
        assert find_fault(stored.parent, 3) is not None
        step, (note,) = keeper(tensors(), stored.parent).resume(Kept())
        assert (step, name in note) == (0, True)


def test_resigning_is_no_fault_by_itself(stored: Path) -> None:
    """Otherwise the tests here would show nothing."""
    resign(stored)
    assert find_fault(stored.parent, 3) is None


def set_in(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = to

    return change


def rename_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tree: Any) -> None:
        tree["files"][name] = tree["files"].pop(FILE)
        for tensor in tree["tensors"].values():
            tensor["parts"] = [[name, *part[1:]] for part in tensor["parts"]]

    return change


TABLE = ("tensors", "model/table")
WRONG = {
    "a parent folder": rename_file("../../secret"),
    "an absolute path": rename_file("/etc/passwd"),
    "a hidden file": rename_file(".hidden"),
    "a folder": rename_file("a/b.safetensors"),
    "a URL": rename_file("file://x"),
    "a line break": rename_file("x\n"),
    "its own name": rename_file("manifest.json"),
    "another format": set_in("format", to="vqscale-checkpoint/2"),
    "an unknown key": set_in("code", to="import os"),
    "a negative step": set_in("step", to=-3),
    "a step that is no number": set_in("step", to="3"),
    "a step that is half a number": set_in("step", to=3.0),
    "no state": lambda tree: tree["files"].pop("state.json"),
    "a size below zero": set_in("files", FILE, "bytes", to=-1),
    "a size beyond all": set_in("files", FILE, "bytes", to=1 << 60),
    "a hash that is none": set_in("files", FILE, "sha256", to="x" * 64),
    "a dtype that is no number": set_in(*TABLE, "dtype", to="object"),
    "a shape beyond all": set_in(*TABLE, "shape", to=[1 << 40, 1 << 40]),
    "a shape of very many dimensions": set_in(*TABLE, "shape", to=[1] * 10_000),
    "a negative shape": set_in(*TABLE, "shape", to=[-40, -9]),
    "a shape of other size": set_in(*TABLE, "shape", to=[40, 10]),
    "no parts": set_in(*TABLE, "parts", to=[]),
    "a gap": set_in(*TABLE, "parts", to=[[FILE, 0, 100], [FILE, 101, 259]]),
    "an overlap": set_in(*TABLE, "parts", to=[[FILE, 0, 200], [FILE, 100, 260]]),
    "parts out of order": set_in(*TABLE, "parts", to=[[FILE, 200, 160], [FILE, 0, 200]]),
    "a part behind the end": set_in(*TABLE, "parts", to=[[FILE, 0, 361]]),
    "a part in a file that is not there": set_in(*TABLE, "parts", to=[["rank-00009.safetensors", 0, 360]]),
    "a part in the state": set_in(*TABLE, "parts", to=[["state.json", 0, 360]]),
    "a part that the file has not": set_in(*TABLE, "parts", to=[[FILE, 0, 180], [FILE, 180, 180]]),
    "another dtype of the same size": set_in(*TABLE, "dtype", to="I32"),
    "more than the files hold": lambda tree: tree["tensors"].update(
        {f"model/{i}": {"shape": [1 << 40], "dtype": "F32", "parts": [[FILE, 0, 1 << 40]]} for i in range(3)}
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_manifests_that_lie_are_refused(name: str, stored: Path) -> None:
    resign(stored, WRONG[name])
    fault = find_fault(stored.parent, 3)
    assert fault is not None
    assert len(fault.splitlines()) == 1
    assert len(fault) < 500


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"3", b"{}", b'{"files": {}}', b"[" * 100_000, b"\xff\xfe", b'{"step": 1e999}']
)
def test_manifests_that_are_none(content: bytes) -> None:
    with pytest.raises(FaultError):
        parse(content)


def head(text: bytes, body: int = 0) -> bytes:
    return len(text).to_bytes(8, "little") + text + b"\0" * body


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HEADS = {
    "too short": b"\x01",
    "longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "of 2^64 - 1 bytes": b"\xff" * 16,
    "no JSON": head(b"{{"),
    "very deep JSON": head(b"[" * 100_000),
    "a list": head(b"[]"),
    "a tensor behind the end": head(entry(offsets=(0, 8)), body=7),
    "more than its tensors": head(entry(), body=9),
    "a gap before": head(entry(offsets=(8, 16)), body=16),
    "sizes that do not fit": head(entry(shape=(3,)), body=8),
    "absurd sizes": head(entry(shape=(1 << 62,), offsets=(0, 1 << 64)), body=8),
    "negative sizes": head(entry(shape=(-2,), offsets=(0, -8)), body=8),
    "half a number": head(entry(shape=(2.0,)), body=8),
    "true for one": head(entry("U8", (True,), (0, 1)), body=1),
    "two dimensions": head(entry(shape=(1, 2)), body=8),
    "another dtype": head(entry("O"), body=8),
    "no dtype": head(b'{"a": {}}'),
    "a dtype that is a list": head(entry([]), body=8),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_lie_are_refused(name: str, stored: Path) -> None:
    data = HEADS[name]
    with pytest.raises(FaultError):
        header.parse(data[: header.head_length(data[:8], len(data))], len(data))
    (stored / FILE).write_bytes(data)
    resign(stored, lambda tree: tree.update(tensors={}))
    fault = find_fault(stored.parent, 3)
    assert fault is not None
    assert FILE in fault


def test_heads_are_those_of_the_library(tmp_path: Path) -> None:
    kinds = {name: torch.arange(5).to(dtype) for name, dtype in DTYPES.items()}
    save_file(kinds, tmp_path / "theirs")
    theirs = (tmp_path / "theirs").read_bytes()
    places = header.parse(theirs[: header.head_length(theirs[:8], len(theirs))], len(theirs))
    assert {name: (place.dtype, place.length) for name, place in places.items()} == {name: (name, 5) for name in kinds}
    for name, place in places.items():
        assert theirs[place.begin : place.end] == kinds[name].view(torch.uint8).numpy().tobytes()
    head, places = header.arrange({name: (name, 5) for name in kinds})
    ours = bytearray(head + b"\0" * (5 * sum(ITEM_BYTES.values())))
    for name, place in places.items():
        assert place.begin % ITEM_BYTES[name] == 0
        ours[place.begin : place.end] = kinds[name].view(torch.uint8).numpy().tobytes()
    assert all(torch.equal(value, kinds[name]) for name, value in load(bytes(ours)).items())


def test_a_file_that_changes_after_it_was_checked_is_refused(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head is compared with the manifest again when it is read."""
    from vqscale.errors import UserError
    from vqscale.training.checkpoints import resuming

    monkeypatch.setattr(resuming.folder, "file_fault", lambda stored, name: None)
    other = {f"{name}:1": value.contiguous().view(-1) for name, value in tensors().items()}
    size = (stored / FILE).stat().st_size
    save_file(other, stored / FILE)
    content = (stored / FILE).read_bytes()
    (stored / FILE).write_bytes(content[:size].ljust(size, b"\0"))
    with pytest.raises(UserError, match=r"cannot be loaded \(.*rank-00000.safetensors: it"):
        keeper(zeros(tensors()), stored.parent).resume(Kept())


def test_nothing_unpickles_what_it_loads() -> None:
    """The weights of the perceptual loss alone may come from `torch.save`; they are read with `weights_only`."""
    for room in ("vqscale", "pipelines", "launcher"):
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            found = {n for n in names if n in ("torch.load", "dcp.FileSystemReader") or n.startswith("pickle.")}
            assert found <= ({"torch.load"} if path.name == "lpips.py" else set()), path
    assert "weights_only=True" in (ROOT / "vqscale/models/lpips.py").read_text(encoding="utf-8")


def test_manifests_of_equal_content_are_equal(stored: Path) -> None:
    data = (stored / "manifest.json").read_bytes()
    found = parse(data)
    assert found.encode() == data
    again = Manifest.model_validate(found.model_dump() | {"sha256": ""})
    assert again.encode() == data
