"""`vqscale checkpoints`, and checkpoints that lie elsewhere than in the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launcher import registry
from launcher.cli import main
from launcher.plan import absolute_paths
from tests.checkpoint_helpers import bits, keeper, save, tensors, zeros
from tests.recipes import tiny_recipe, write_recipe
from tests.training_helpers import Kept, one_process
from vqscale import storage
from vqscale.checkpoint import folder
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import write_json
from vqscale.training.checkpoints.reader import newest, require

if TYPE_CHECKING:  # the plugin is imported by pytest
    from tests.object_store import ObjectStore

pytest_plugins = ("tests.object_store",)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with one_process(monkeypatch):
        yield


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, known to the index, with three checkpoints of its tokenizer, the newest of them damaged."""
    monkeypatch.setenv("VQSCALE_HOME", str(tmp_path / "home"))
    root = tmp_path / "tiny-1"
    root.mkdir()
    write_recipe(root / "recipe.yaml")
    write_json(root / "run.json", {"id": "tiny-1", "created": 1.0})
    registry.require_writable()
    registry.claim("tiny-1", root, 1.0)
    for step in (3, 6, 9):
        save(checkpoints_of(root), step)
    flip(checkpoints_of(root) / "step-00000009" / "rank-00000.safetensors")
    return root


def checkpoints_of(root: Path, stage: str = "tokenizer") -> Path:
    return root / "checkpoints" / stage


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["checkpoints", *words]) == code
    return capsys.readouterr().out


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "ls", "latest").splitlines()
    assert [line.split()[:3] for line in lines] == [["tokenizer", "step", str(step)] for step in (9, 6, 3)]
    assert "10 tensors  1 ranks, ddp" in lines[0]
    (checkpoints_of(run) / "step-00000006" / "manifest.json").unlink()
    found = json.loads(said(capsys, "ls", "tiny", "--json"))
    assert [(one["stage"], one["step"], bool(one["fault"])) for one in found] == [
        ("tokenizer", 9, False), ("tokenizer", 6, True), ("tokenizer", 3, False)
    ]  # fmt: skip
    assert found[0]["made_by"]["recipe"] == "tiny"
    assert json.loads(said(capsys, "ls", str(run), "--json", "--stage", "prior")) == []
    assert said(capsys, "ls", str(run), "--stage", "prior") == f"{run}: no checkpoints\n"


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "verify", "latest", code=1).splitlines()
    assert lines[0].startswith("tokenizer step 9: rank-00000.safetensors is not what the manifest says")
    assert lines[1:] == [f"tokenizer step {step}: is as its manifest says" for step in (6, 3)]
    found = json.loads(said(capsys, "verify", "latest", "--json", code=1))
    assert [bool(one["fault"]) for one in found] == [True, False, False]
    folder.remove(checkpoints_of(run), 9)
    said(capsys, "verify", "latest")


def test_prune_keeps_valid_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damaged newest one counts for nothing, and is left where it is: a save may be under way there."""
    planned = json.loads(said(capsys, "prune", "latest", "--keep", "1", "--dry-run", "--json"))["tokenizer"]
    assert (planned["kept"], planned["removed"], list(planned["faults"])) == ([6], [3], ["9"])
    assert folder.steps(checkpoints_of(run)) == [9, 6, 3]
    assert "tokenizer step 3: removed\ntokenizer: keeps step 6\n" in said(capsys, "prune", "latest", "--keep", "1")
    assert folder.steps(checkpoints_of(run)) == [9, 6]
    flip(checkpoints_of(run) / "step-00000006" / "rank-00000.safetensors")
    assert "none is valid, so nothing is removed" in said(capsys, "prune", "latest", "--keep", "1", code=1)
    assert folder.steps(checkpoints_of(run)) == [9, 6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls"], "the following arguments are required: RUN"),
        (["ls", "other"], "no run 'other'"),
        (["lst", "latest"], "unknown command 'lst'; did you mean 'ls'?"),
        (["prune", "latest"], "the following arguments are required: --keep"),
        (["prune", "latest", "--keep", "0"], "--keep: keeps 0 checkpoints; keep 1 or more"),
        (["ls", "latest", "--stage", "tokeniser"], "no stage 'tokeniser' has checkpoints; did you mean 'tokenizer'?"),
        (["verify", "latest", "--stage", "prior"], "has no checkpoints"),
        (["ls", "latest", "--jsn"], "unknown option '--jsn'; did you mean '--json'?"),
    ],
)
def test_faults_are_one_line(words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", *words]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert message in printed.err


def test_the_layout_knows_where_checkpoints_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RunLayout(run)
    assert layout.checkpoints(tiny_recipe(), "prior") == str(run / "checkpoints" / "prior")
    elsewhere = tiny_recipe(resources__checkpoints="s3://bucket/all/")
    assert layout.checkpoints(elsewhere, "prior") == "s3://bucket/all/tiny-1/prior"
    monkeypatch.chdir(run)
    assert absolute_paths(tiny_recipe(resources__checkpoints="far")).resources.checkpoints == str(run / "far")
    assert absolute_paths(elsewhere).resources.checkpoints == "s3://bucket/all/"


def round_trip(where: str) -> None:
    """Save, resume, tamper, resume, prune; the same as on a disk."""
    for step in (3, 6):
        save(where, step, seed=step)
    assert folder.steps(where) == [6, 3]
    state, kept = zeros(tensors()), Kept()
    assert keeper(state, where).resume(kept) == (6, [])
    assert bits(state) == bits(tensors(6))
    assert "window" in kept.extra
    content = bytearray(storage.read_bytes(f"{where}/step-00000006/rank-00000.safetensors"))
    content[-1] ^= 1
    storage.write_bytes(f"{where}/step-00000006/rank-00000.safetensors", bytes(content))
    step, (note,) = keeper(state, where).resume(Kept())
    assert (step, "sha256 differs" in note) == (3, True)
    assert bits(state) == bits(tensors(3))
    storage.remove(f"{where}/step-00000006/manifest.json")
    assert "was never committed" in newest(where)[1][0]
    save(where, 6, keep=1)
    assert folder.steps(where) == [6]
    assert require(where, "prior").step == 6


def test_in_memory() -> None:
    """Fsspec's plainest file system, without asynchronous requests."""
    round_trip("memory://bucket/run/tokenizer")


def test_in_an_object_store(object_store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    round_trip(object_store.url("run/tokenizer"))


def test_the_manifest_is_the_commit_where_nothing_can_be_renamed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where, write = "memory://bucket/commit/tokenizer", storage.write_bytes
    written: list[str] = []

    def failing(url: Any, data: bytes) -> None:
        written.append(str(url).rpartition("/")[2])
        if len(written) == 6:
            raise UserError("cannot be reached, 9 tries in a row failed", where=str(url))
        write(url, data)

    monkeypatch.setattr(storage, "write_bytes", failing)
    checkpoints = keeper(tensors(), where, keep=1)
    for step in (3, 6):
        checkpoints.save(Kept(), step)
        checkpoints.finish()
    assert written == ["rank-00000.safetensors", "state.json", "manifest.json"] * 2
    assert "step 6: no checkpoint: rank 0: " in capsys.readouterr().out
    assert folder.steps(where) == [3], "what was uploaded of the failed one is taken away"
    assert newest(where)[1] == []
