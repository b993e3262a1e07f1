"""Logs of ranks: stamped by the processes, merged by time, marked; of several nodes, followed over attempts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher import logs, process
from launcher.logs import LogChoice, last_words, print_logs
from launcher.show import page_facts
from launcher.state import RunState
from launcher.status import read_status
from launcher.wording import below
from tests.test_launcher_runs import logs_of, new_run
from vqscale import stamps
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.events import EventLog
from vqscale.files import write_json

NOON = 1_769_860_800.0


def at(seconds: float, text: str) -> str:
    return f"{stamps.stamp(NOON + seconds)} {text}\n"


def write(layout: RunLayout, attempt: int, node: str, place: int, text: str, rank: int | None = None) -> Path:
    folder = layout.attempt("generate", attempt) / f"ranks/{node}/attempt_0/{place}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "stdout.log").open("a") as file:
        file.write(text)
    if rank is not None:
        (folder / "rank").write_text(str(rank))
    return folder


def begin(layout: RunLayout, attempt: int, end: str | None = None) -> None:
    state = RunState.read(layout)
    state.begin("generate", attempt)
    if end:
        state.end("generate", end)  # type: ignore[arg-type]
    state.write(layout)


def test_each_line_is_stamped_when_it_begins() -> None:
    now, below = [NOON], io.StringIO()
    stream = stamps.StampedStream(below, clock=lambda: now[0])
    print("one", 1, file=stream)
    now[0] += 1.5
    stream.write("two\n\nthr")
    now[0] += 1
    stream.write("")
    stream.write("ee\n")
    assert below.getvalue() == at(0, "one 1") + at(1.5, "two") + at(1.5, "") + at(1.5, "three")
    assert [stamps.split(line)[1] for line in below.getvalue().splitlines()] == ["one 1", "two", "", "three"]
    assert stamps.split("2026-01-31 no stamp") == ("", "2026-01-31 no stamp")


def test_files_are_stamped_and_pipes_are_not(tmp_path: Path) -> None:
    code = "from vqscale.stamps import stamp_output; stamp_output(); print('out'); 1 / 0"
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.startswith("Traceback")
    assert stamps.split((tmp_path / "log").read_text())[1] == "out\n"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=log, check=False)
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(stamps.split(line)[0] for line in lines), "every line of the traceback"
    attempt = tmp_path / "attempt-001"
    (attempt / "ranks/x/attempt_0/0").mkdir(parents=True)
    (tmp_path / "log").rename(attempt / "ranks/x/attempt_0/0/stderr.log")
    assert last_words(attempt) == "ZeroDivisionError: division by zero"


def test_ranks_of_several_nodes_are_merged_by_time(home: Path) -> None:
    layout = new_run(home, "mine")
    begin(layout, 2)
    write(layout, 2, "id_a", 0, at(0, "a") + at(3, "d") + "native\n", rank=1)
    write(layout, 2, "id_b", 0, at(1, "b") + at(4, "e"), rank=0)
    write(layout, 2, "id_c", 0, at(2, "c"))
    one, zero, unknown = "[generate#2 rank 1]", "[generate#2 rank 0]", "[generate#2 node c process 0]"
    printed = [f"{line.partition(']')[0]}] {line.rpartition(' ')[2]}" for line in logs_of(layout)]
    assert printed == [f"{one} a", f"{zero} b", f"{unknown} c", f"{one} d", f"{one} native", f"{zero} e"]
    assert len(logs_of(layout, rank=0)) == 2
    assert logs_of(layout, rank=7) == [], "it may be the one that has not said who it is"
    write(layout, 2, "id_c", 0, "", rank=2)
    with pytest.raises(UserError, match="ranks: 0, 1, 2"):
        logs_of(layout, rank=7)
    write_json(layout.failure("generate"), {"rank": 2, "message": "boom"})
    (layout.attempt("generate", 2) / "ranks/id_a/attempt_0/0/error.json").write_text("{}")
    assert {line.split("]")[0] for line in logs_of(layout, failed=True)} == {"[generate#2 rank 1", "[generate#2 rank 2"}


def test_following_goes_on_with_the_next_attempt(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempted and started again, while somebody follows the stage; a rank that is known late is marked right."""
    layout = new_run(home, "mine")
    me = process.identity(os.getpid())
    write_json(layout.supervisor, me)
    begin(layout, 1)
    write(layout, 1, "id_a", 0, at(0, "one"))
    write(layout, 1, "id_b", 0, at(1, "two"), rank=0)

    def start_again() -> None:
        begin(layout, 1, end="preempted")
        write(layout, 1, "id_a", 0, at(2, "three"), rank=1)

    def second_attempt() -> None:
        begin(layout, 2)
        write(layout, 2, "id_a", 0, at(3, "four"))

    def end() -> None:
        write(layout, 2, "id_a", 0, "five")  # no newline: its writer was killed
        begin(layout, 2, end="failed")

    acts = iter([start_again, second_attempt, end])
    monkeypatch.setattr(logs.time, "sleep", lambda seconds: next(acts)())
    printed: list[str] = []
    print_logs(layout, LogChoice(stage="generate"), follow=True, say=lambda line: printed.append(line.plain()))
    assert [(line.partition("]")[0], line.split()[-1]) for line in printed] == [
        ("[generate#1 node a process 0", "one"),
        ("[generate#1 rank 0", "two"),
        ("[generate#1 rank 1", "three"),
        ("[generate#2 rank 0", "four"),
        ("[generate#2 rank 0", "five"),
    ]


def test_tasks_of_an_array_are_merged_too(home: Path) -> None:
    layout = new_run(home, "mine", resources__processes=1)
    state = RunState.read(layout)
    state.stages["extract"].tasks = 3
    state.write(layout)
    for task, seconds in ((0, 1), (2, 0)):  # task 1 has not begun
        own = layout.of_task(task)
        entry = RunState.read(own)
        entry.begin("extract", 1)
        entry.write(own)
        folder = own.attempt("extract", 1) / "ranks/id_x/attempt_0/0"
        folder.mkdir(parents=True)
        (folder / "stdout.log").write_text(at(seconds, f"from {task}"))
        EventLog(own.events("extract"), "extract", 1, "images/s", 10).log(4 + task, rate=100.0)
    lines = logs_of(layout, stage="extract")
    assert [line.partition("]")[0] for line in lines] == ["[extract.2#1 rank 0", "[extract.0#1 rank 0"]
    assert [line.split()[-1] for line in logs_of(layout, stage="extract", task=2)] == ["2"]
    for task, expected in [(3, "tasks: 0 to 2"), (1, "no such attempt")]:
        with pytest.raises(UserError, match=expected):
            logs_of(layout, stage="extract", task=task)
    with pytest.raises(UserError, match="leave --task out"):
        logs_of(layout, stage="pack", task=0)
    stage = read_status(layout).stage
    assert stage is not None
    assert (stage.stage, stage.step, stage.total, stage.rate) == ("extract", 10, None, 200.0)
    assert "extract: 0 of 3 tasks done" in below(read_status(layout))
    attempts = page_facts(layout)["attempts"]["extract"]
    assert [(one["task"], one["attempt"], one["state"]) for one in attempts] == [(0, 1, "running"), (2, 1, "running")]
    write_json(layout.of_task(0).done("extract"), {})
    assert [line.split()[-1] for line in logs_of(layout, stage="extract", failed=True)] == ["2"]


def test_threads_do_not_break_lines() -> None:
    below = io.StringIO()
    stream = stamps.StampedStream(below)
    threads = [threading.Thread(target=lambda: [stream.write("whole\n") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [stamps.split(line) for line in below.getvalue().splitlines()]
    assert len(texts) == 800
    assert all(when and text == "whole" for when, text in texts)
