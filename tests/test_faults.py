"""Faults on demand: how they are asked for, that they happen once, and what each does."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vqscale.errors import UserError
from vqscale.faults import ACTIONS, NO_FAULTS, POINTS, Fault, Faults, InjectedError, parse_faults
from vqscale.storage.faulty import FaultyStore


def test_a_fault_is_written_as_it_is_read() -> None:
    text = "kill:step=37,rank=1,point=during-save"
    assert Fault.parse(text) == Fault("kill", 37, 1, "during-save")
    assert str(Fault.parse(text)) == text
    assert Fault.parse(str(Fault("slow", 4, seconds=0.5, stage="prior"))).seconds == 0.5
    assert [fault.action for fault in parse_faults(" nan:step=5 ; enospc:step=8; ")] == ["nan", "enospc"]
    assert parse_faults("") == ()


def test_an_action_lies_at_its_own_point() -> None:
    points = {action: Fault.parse(f"{action}:step=1").point for action in ACTIONS}
    assert points["nan"] == "step"
    assert points["truncate-shard"] == "loader"
    assert points["enospc"] == "during-save"
    assert set(points.values()) <= POINTS.keys()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("explode:step=1", "unknown action 'explode'; actions: kill, stop, exception"),
        ("kill", "'kill' has no step"),
        ("kill:step=soon", "step=soon is not a number"),
        ("kill:step=1,when=2", "unknown setting 'when'; settings: step, rank, point"),
        ("kill:step=1,point=lunch", "unknown point 'lunch'; points: step, all-reduce"),
        ("nan:step=1,point=loader", "nan happens at point step only"),
        ("hold:step=1,point=during-save", "hold happens at point step only"),
    ],
)
def test_a_faulty_fault_gets_one_clear_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match="VQSCALE_FAULT") as raised:
        parse_faults(text)
    assert said in str(raised.value)


def test_a_fault_happens_to_its_rank_and_stage_at_its_step_alone() -> None:
    asked = parse_faults("nan:step=2,rank=1,stage=prior")
    assert not Faults(asked, "prior", rank=0)
    assert not Faults(asked, "tokenizer", rank=1)
    mine = Faults(asked, "prior", rank=1)
    assert [mine.at(point, step) for point, step in [("step", 1), ("all-reduce", 2), ("step", 2)]] == [
        set(),
        set(),
        {"nan"},
    ]
    assert not mine.at("step", 2), "once"
    assert not NO_FAULTS.at("step", 2)


def test_a_fault_that_happened_is_spent_in_later_attempts(tmp_path: Path) -> None:
    record, asked = tmp_path / "faults.jsonl", parse_faults("nan:step=2; exception:step=2,times=2")
    for attempt in range(3):
        faults = Faults(asked, "prior", 0, record)
        if attempt < 2:
            with pytest.raises(InjectedError, match="exception:step=2"):
                faults.at("step", 2)
    assert not Faults(asked, "prior", 0, record)
    lines = [json.loads(line)["fault"] for line in record.read_text().splitlines()]
    assert lines == ["nan:step=2", "exception:step=2,times=2", "exception:step=2,times=2"]


def test_the_environment_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQSCALE_FAULT", "enospc:step=3")
    faults = Faults.from_environment("tokenizer", 0, tmp_path / "faults.jsonl")
    with pytest.raises(OSError, match="No space left") as raised:
        faults.at("during-save", 3)
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.delenv("VQSCALE_FAULT")
    assert not Faults.from_environment("tokenizer", 0, tmp_path / "faults.jsonl")


@pytest.mark.fault
@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_signals_go_to_the_process_itself(action: str, number: int, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from vqscale.faults import Faults, parse_faults
Faults(parse_faults("{action}:step=1"), "x", 0, Path("{tmp_path}/faults.jsonl")).at("step", 1)
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert (os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.WTERMSIG(status)) == number
        assert (tmp_path / "faults.jsonl").read_text().startswith(f'{{"fault": "{action}:step=1"'), "recorded before"
        child.returncode = 0 if os.WIFSIGNALED(status) else None
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()


def test_slow_sleeps_as_long_as_asked() -> None:
    began = time.monotonic()
    Faults(parse_faults("slow:step=1,seconds=0.05")).at("step", 1)
    assert time.monotonic() - began >= 0.05


@pytest.mark.parametrize("by", ["request", "file"])
def test_hold_waits_for_what_ends_it(by: str, tmp_path: Path) -> None:
    """Also for what came before the fault did."""
    asked, file, over = threading.Event(), tmp_path / "go on", threading.Event()

    def hold(step: int) -> None:
        Faults(parse_faults(f"hold:step={step},file={file}")).at("step", step, asked=asked.is_set)
        over.set()

    thread = threading.Thread(target=hold, args=(1,), daemon=True)
    thread.start()
    assert not over.wait(0.2)
    asked.set() if by == "request" else file.touch()
    thread.join()
    assert over.is_set()
    hold(2)


def test_a_shard_is_truncated_on_demand(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(bytes(range(100)))
    store = FaultyStore(Faults(parse_faults("truncate-shard:step=1")))
    opened = [bytes(store.open(str(shard))) for _ in range(3)]
    assert [len(content) for content in opened] == [100, 50, 100]
    assert opened[1] == bytes(range(50))
