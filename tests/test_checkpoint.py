"""Checkpoints: bit-exact, committed, checked before they are used. One rank; several in test_checkpoint_ranks."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint_helpers import bits, keeper, names, save, tensors, zeros
from tests.training_helpers import Kept, Recorder, one_process
from vqscale.checkpoint import commit, folder
from vqscale.errors import UserError
from vqscale.files import read_json
from vqscale.training.checkpoints import faults
from vqscale.training.checkpoints.faults import CheckpointError
from vqscale.training.checkpoints.reader import Checkpoint, content_hash, newest, require
from vqscale.training.checkpoints.writer import Writer

FILES = ("manifest.json", "rank-00000.safetensors", "state.json")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one; no test leaves a save behind."""
    with one_process(monkeypatch):
        yield
        assert not [thread for thread in threading.enumerate() if thread.name == "vqscale-checkpoint"]


def found_steps(where: Path) -> tuple[int | None, int]:
    """Step of the newest valid one, and how many were passed over."""
    found, notes = newest(where)
    return found and found.step, len(notes)


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    save(tmp_path, 3)
    state, kept = zeros(tensors()), Kept()
    assert keeper(state, tmp_path).resume(kept) == (3, [])
    assert bits(state) == bits(tensors())
    assert state["model/kernel"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kept.extra["window"], torch.arange(3))


def test_whole_tensors_are_read_without_a_training(tmp_path: Path) -> None:
    save(tmp_path, 3)
    checkpoint = require(tmp_path, "tokenizer")
    model = {name.removeprefix("model/"): value for name, value in tensors().items() if name.startswith("model/")}
    assert bits(checkpoint.tensors("model/")) == bits(model)
    assert set(checkpoint.tensors("model/", but=["model/odd"])) == set(model) - {"odd"}
    assert checkpoint.state()["position"] == 12
    assert checkpoint.state()["seed"] == 0


def test_the_files_are_what_their_names_say(tmp_path: Path) -> None:
    """Safetensors' own library reads them, nothing in them is a pickle, and DCP leaves none beside."""
    save(tmp_path, 3)
    path = tmp_path / "step-00000003"
    assert names(path) == sorted(FILES)
    assert names(tmp_path) == ["step-00000003"]
    for name in FILES:
        assert not (path / name).read_bytes().startswith((b"PK", b"\x80"))
    expected = {f"{name}:0": value.contiguous().view(-1) for name, value in tensors().items()}
    assert bits(load_file(path / FILES[1])) == bits(expected | {"extra/window:0": torch.arange(3)})


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    for number, seed in enumerate((0, 0, 1)):
        save(tmp_path / str(number), 3, seed)
    one, again, other = (require(tmp_path / str(number), "tokenizer").fingerprint() for number in range(3))
    assert one == again != other
    state = {"a": torch.arange(6.0).view(2, 3)}
    for changed in ({"b": state["a"]}, {"a": state["a"].view(3, 2)}, {"a": state["a"].double()}, {"a": -state["a"]}):
        assert content_hash(changed) != content_hash(state)
    assert content_hash(state, {}) != content_hash({}, state), "a running average is no network"
    assert content_hash({"a": state["a"].T.contiguous().T}) == content_hash(state)


def test_newest_of_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])
    assert keeper(tensors(), tmp_path / "nowhere").resume(Kept()) == (0, [])
    with pytest.raises(UserError, match="no checkpoint; run the stage 'tokenizer' first"):
        require(tmp_path / "nowhere", "tokenizer")


@pytest.mark.fault
@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_passed_over(name: str, tmp_path: Path) -> None:
    for step in (3, 6):
        save(tmp_path, step)
    file = tmp_path / "step-00000006" / name
    content = file.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 80)):
        for bit in (1, 128):
            file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            assert found_steps(tmp_path) == (3, 1), f"byte {place}"
    state = zeros(tensors())
    step, (note,) = keeper(state, tmp_path).resume(Kept())
    assert step == 3
    assert f"step-00000006: {name}" in note
    assert note.endswith("; passed over")
    file.write_bytes(content)
    assert found_steps(tmp_path) == (6, 0)


@pytest.mark.fault
@pytest.mark.parametrize("name", FILES)
def test_torn_ones_are_passed_over(name: str, tmp_path: Path) -> None:
    for step in (3, 6):
        save(tmp_path, step)
    file = tmp_path / "step-00000006" / name
    content = file.read_bytes()
    for kept in (0, 1, 7, 9, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:kept])
        assert found_steps(tmp_path) == (3, 1), kept
    file.write_bytes(content + b"\n")
    assert found_steps(tmp_path) == (3, 1)
    file.unlink()
    _, (note,) = newest(tmp_path)
    assert ("was never committed" if name == "manifest.json" else f"{name} is missing") in note
    shutil.rmtree(tmp_path / "step-00000003")
    with pytest.raises(UserError, match=r"step-00000006: .*; passed over"):
        require(tmp_path, "prior")


def test_another_checkpoints_files_do_not_pass(tmp_path: Path) -> None:
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000006")
    _, (note,) = newest(tmp_path)
    assert "manifest.json is that of step 3" in note
    save(tmp_path / "other", 3, seed=1)
    shutil.copy(tmp_path / "other" / "step-00000003" / FILES[1], tmp_path / "step-00000003")
    assert found_steps(tmp_path) == (None, 2)


def test_what_is_out_of_reach_is_not_taken_for_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a run would begin anew while the network is down."""
    save(tmp_path, 3)

    def unreachable(url: Any) -> int:
        raise UserError("cannot be reached", where=str(url))

    monkeypatch.setattr(folder.storage, "size", unreachable)
    with pytest.raises(UserError, match="cannot be reached"):
        keeper(tensors(), tmp_path).resume(Kept())


def test_retention(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000006", "step-00000008"]


def test_an_old_one_goes_only_after_the_new_one_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2, keep=1)
    removed: list[int] = []
    remove = folder.remove

    def watch(where: Any, step: int) -> None:
        removed.append(step)
        assert folder.find_fault(tmp_path, 4) is None
        remove(where, step)

    monkeypatch.setattr(folder, "remove", watch)
    save(tmp_path, 4, keep=1)
    assert removed == [2]


def test_damaged_later_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """Step 8 is torn, the run goes on from 4 and saves 6: keeping the 'newest' by name would keep step 8 alone."""
    for step in (4, 8):
        save(tmp_path, step, keep=2)
    (tmp_path / "step-00000008" / "manifest.json").unlink()
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["step-00000006"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    first = require(tmp_path, "prior").fingerprint()
    save(tmp_path, 3, seed=1)
    assert require(tmp_path, "prior").fingerprint() != first
    assert names(tmp_path) == ["step-00000003"]


def failing(real: Any, number: int, calls: list[int]) -> Any:
    """A function whose call with that number finds the disk full."""

    def call(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **more)

    return call


@pytest.mark.fault
@pytest.mark.parametrize(
    ("function", "number"), [("_write", 1), ("_write", 2), ("_write", 3), ("_sync", 1), ("_put_in_place", 1)]
)
def test_a_full_disk_costs_one_checkpoint(
    function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any point of a save: the training goes on, says so, and the one before is still there."""
    checkpoints, journal = keeper(tensors(1), tmp_path, keep=1), Recorder()
    save(tmp_path, 3, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(commit, function, failing(getattr(commit, function), number, []))
        checkpoints.save(Kept(), 6, journal)  # type: ignore[arg-type]
        checkpoints.finish(journal)  # type: ignore[arg-type]
        assert "warning: step 6: no checkpoint: rank 0: No space left on device" in capsys.readouterr().out
    assert names(tmp_path) == ["step-00000003"]
    assert found_steps(tmp_path) == (3, 0)
    assert journal.lines[6] == {"checkpoint/failed": 1.0}
    assert [(event["committed"], event["fault"]) for event in journal.events] == [
        (False, "rank 0: No space left on device")
    ]
    checkpoints.save(Kept(), 9)
    checkpoints.finish()
    assert names(tmp_path) == ["step-00000009"]


@pytest.mark.fault
def test_the_last_one_has_to_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_write", failing(commit._write, 1, []))
    with pytest.raises(UserError, match=r"the last step 3 could not be written .*No space left.*requeue"):
        save(tmp_path, 3)
    assert names(tmp_path) == []


@pytest.mark.fault
def test_room_is_looked_for_before_a_save_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1 << 20))
    monkeypatch.setattr(commit.Attempt, "begin", lambda attempt: pytest.fail("the save has begun"))
    checkpoints = keeper(tensors(), tmp_path / "not" / "there")
    checkpoints.save(Kept(), 3)
    assert f"no checkpoint: 16 MiB are needed, 1 MiB are free in {tmp_path}" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 MiB are free"):
        checkpoints.save(Kept(), 6, final=True)


def test_a_save_in_the_background_equals_a_blocking_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, though training changes everything as soon as it may."""
    save(tmp_path / "blocking", 3)
    go, write = threading.Event(), commit._write
    monkeypatch.setattr(commit, "_write", lambda *given: (go.wait(), write(*given)))
    state, kept = tensors(), Kept({"window": torch.arange(3)})
    with keeper(state, tmp_path / "async") as checkpoints:
        checkpoints.save(kept, 3)
        for value in (*state.values(), *kept.extra.values()):
            value.zero_()
        assert newest(tmp_path / "async") == (None, [])
        go.set()
    for name in FILES:
        assert content_of(tmp_path / "async", name) == content_of(tmp_path / "blocking", name)


def content_of(where: Path, name: str) -> bytes:
    return (where / "step-00000003" / name).read_bytes()


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write, before = threading.Event(), commit._write, []

    def slow(*given: Any) -> None:
        go.wait()
        before.append(folder.steps(tmp_path))
        write(*given)

    monkeypatch.setattr(commit, "_write", slow)
    state = tensors()
    with keeper(state, tmp_path) as checkpoints:
        checkpoints.save(Kept(), 3)
        state["model/table"].add_(1)
        threading.Timer(0.1, go.set).start()
        checkpoints.save(Kept(), 6)
    assert before == [[]] * 3 + [[3]] * 3
    tables = [Checkpoint(folder.open_valid(tmp_path, step)).tensors("model/")["table"] for step in (3, 6)]
    assert torch.equal(tables[1], tables[0] + 1)


def test_a_layout_that_changes_is_planned_anew(tmp_path: Path) -> None:
    """Optimizers make their tensors at the first step, an adversary later."""
    state, kept = tensors(), Kept()
    checkpoints = keeper(state, tmp_path)
    for step, extra in ((3, {}), (6, {"late": torch.arange(5)}), (9, {"late": torch.arange(9)}), (12, {})):
        kept.extra = extra
        checkpoints.save(kept, step)
        checkpoints.finish()
        assert bits(Checkpoint(folder.open_valid(tmp_path, step)).tensors("extra/")) == bits(extra)


def test_a_fault_in_the_thread_comes_out_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise ValueError("a slip in the program")

    monkeypatch.setattr(Writer, "write_data", broken)
    checkpoints = keeper(tensors(), tmp_path)
    checkpoints.save(Kept(), 3)
    thread = checkpoints._background._thread
    assert thread is not None
    thread.join()
    with pytest.raises(CheckpointError, match="a slip in the program"):
        checkpoints.poll()
    assert names(tmp_path) == []
    checkpoints.poll()  # said once


def test_a_training_that_fails_still_gets_the_checkpoint_on_its_way(tmp_path: Path) -> None:
    def train() -> None:
        with keeper(tensors(), tmp_path) as checkpoints:
            checkpoints.save(Kept(), 3)
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        train()
    assert found_steps(tmp_path) == (3, 0)


def test_what_a_save_cost_is_said(tmp_path: Path) -> None:
    checkpoints, journal = keeper(tensors(), tmp_path), Recorder()
    checkpoints.save(Kept(), 3, journal)  # type: ignore[arg-type]
    checkpoints.finish(journal)  # type: ignore[arg-type]
    figures, (event,) = journal.lines[3], journal.events
    assert {"checkpoint/stall_s", "checkpoint/write_s", "checkpoint/failed"} == set(figures)
    assert 0 < figures["checkpoint/stall_s"] == event["stall_s"]
    assert (event["event"], event["step"], event["committed"]) == ("checkpoint", 3, True)
    assert event["bytes"] == sum(value.nbytes for value in tensors().values())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model/table", torch.zeros(40, 8), r"model/table is F32 \[40, 9\] in it and F32 \[40, 8\] by the recipe"),
        ("model/table", torch.zeros(40, 9).double(), r"model/table is F32 \[40, 9\] in it and F64"),
        ("model/more", torch.zeros(2), r"model/more is absent in it and F32 \[2\] by the recipe"),
        ("model/table", None, r"model/table is F32 \[40, 9\] in it and absent by the recipe"),
        ("optimizer/muon/momentum/table", torch.zeros(2), "optimizer/muon/momentum/table is absent in it"),
    ],
)
def test_another_recipe_is_one_clear_line(name: str, value: Any, said: str, tmp_path: Path) -> None:
    save(tmp_path, 3)
    state = zeros(tensors()) | {name: value}
    with pytest.raises(UserError, match=rf"step-00000003: does not fit the recipe \({said}.*; resume with") as caught:
        keeper({name: value for name, value in state.items() if value is not None}, tmp_path).resume(Kept())
    assert len(str(caught.value).splitlines()) == 1
    assert not state["model/kernel"].any(), "nothing was loaded"


def test_another_seed_is_refused_and_other_settings_are_said(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with pytest.raises(UserError, match="was trained with seed 0, the recipe has 5"):
        keeper(tensors(), tmp_path, seed=5).resume(Kept())
    step, notes = keeper(tensors(), tmp_path, learning_rate=2.0).resume(Kept())
    assert (step, notes) == (3, ["goes on with another training.learning_rate: 1.0 before, 2.0 now"])


@pytest.mark.parametrize("damaged", [False, True])
def test_another_runs_checkpoints_are_neither_loaded_nor_removed(damaged: bool, tmp_path: Path) -> None:
    mine, theirs = "Monday on one", "Tuesday on two"
    save(tmp_path, 3, run=theirs)
    if damaged:
        (tmp_path / "step-00000003" / "rank-00000.safetensors").unlink()
    state = zeros(tensors())
    with pytest.raises(UserError, match=f"is of another run with this id .made {theirs}; this one {mine}") as caught:
        keeper(state, tmp_path, run=mine).resume(Kept())
    assert "\n" not in str(caught.value)
    assert not state["model/table"].any()
    for step in (2, 4, 5):  # both began when the folder was empty
        save(tmp_path, step, run=mine, keep=1)
    assert folder.steps(tmp_path) == [5, 3]


def test_checkpoints_that_do_not_say_whose_they_are_stay_their_runs(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert keeper(zeros(tensors()), tmp_path, run="mine").resume(Kept()) == (3, [])
    save(tmp_path, 6, run="mine", keep=1)
    assert folder.steps(tmp_path) == [6]


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, 3)
    manifest = read_json(tmp_path / "step-00000003" / "manifest.json")
    assert (manifest["format"], manifest["step"], manifest["world"]) == ("vqscale-checkpoint/1", 3, 1)
    assert (manifest["strategy"], manifest["made_by"]["recipe"]) == ("ddp", "tiny")
    assert manifest["tensors"]["model/table"] == {
        "shape": [40, 9], "dtype": "F32", "parts": [["rank-00000.safetensors", 0, 360]]
    }  # fmt: skip
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
