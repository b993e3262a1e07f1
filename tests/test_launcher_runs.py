"""Run directories, the index, status and logs, without starting anything."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from launcher import process, registry, snapshot
from launcher.cli import main
from launcher.logs import LogChoice, print_logs
from launcher.plan import make_plan
from launcher.registry import choose_directory, resolve
from launcher.report import figures, seconds
from launcher.rundir import create
from launcher.state import RunState
from launcher.status import read_status
from launcher.watch import PlainLines
from launcher.wording import duration, stage_line
from tests.recipes import tiny_recipe, write_recipe
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.events import EventLog
from vqscale.files import read_json, write_json
from vqscale.sources import sources_hash


def new_run(home: Path, run: str | None = None, **overrides: object) -> RunLayout:
    path = write_recipe(home / "r.yaml", **overrides)
    return create(make_plan(str(path), run=home / run if run else None))


def test_run_directory_is_the_record(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_SECRET_KEY", "do not write me")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    layout = new_run(home)
    assert layout.read_recipe() == tiny_recipe()
    info = read_json(layout.info)
    assert info["id"] == layout.root.name
    assert info["profile"]["name"] == "local"
    identity = read_json(layout.code / "identity.json")
    assert len(identity["sources_sha256"]) == 64
    environment = read_json(layout.code / "environment.json")
    assert environment["variables"]["NCCL_DEBUG"] == "INFO"
    assert "pydantic" in environment["packages"]
    assert "do not write me" not in (layout.code / "environment.json").read_text()
    assert RunState.read(layout).word == "waiting"
    assert (home / "runs" / "latest").resolve() == layout.root


def test_snapshot_holds_uncommitted_work(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "vqscale").mkdir(parents=True)
    for room in ("launcher", "pipelines", "cluster"):
        (source / room).mkdir()
        (source / room / "a.py").write_text("")
    known = source / "vqscale" / "known.py"
    known.write_text("x = 1\n")
    git = "git -c user.name=t -c user.email=t@t -c init.defaultBranch=main"
    os.system(f"cd {source} && {git} init -q && {git} add -A && {git} commit -qm one")
    before = sources_hash(source)
    known.write_text("x = 2\n")
    (source / "vqscale" / "new.py").write_text("y = 1\n")
    snapshot.write_snapshot(source, tmp_path / "code")
    identity = read_json(tmp_path / "code" / "identity.json")
    assert len(identity["commit"]) == 40
    assert identity["uncommitted"] is True
    assert identity["untracked"] == ["vqscale/new.py"]
    assert identity["sources_sha256"] != before
    assert "+x = 2" in (tmp_path / "code" / "uncommitted.diff").read_text()
    assert (tmp_path / "code" / "untracked" / "vqscale" / "new.py").read_text() == "y = 1\n"


def test_snapshot_without_git(tmp_path: Path) -> None:
    snapshot.write_snapshot(tmp_path, tmp_path / "code")
    identity = read_json(tmp_path / "code" / "identity.json")
    assert identity["commit"] is None
    assert identity["uncommitted"] is None


def test_names_collide_into_suffixes(home: Path) -> None:
    now = time.time()
    first = choose_directory("tiny", None, now)
    first.mkdir(parents=True)
    assert choose_directory("tiny", None, now).name == f"{first.name}-2"


def test_chosen_directories(home: Path) -> None:
    layout = new_run(home, "mine")
    with pytest.raises(UserError, match="holds a run already"):
        choose_directory("tiny", str(layout.root))
    with pytest.raises(UserError, match="is not an empty directory"):
        choose_directory("tiny", str(home))
    assert new_run(home, "other/mine").root == home / "other" / "mine"
    assert {entry.id for entry in registry.entries()} == {"mine", "mine-2"}


def test_resolve(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = new_run(home, "alpha-1"), new_run(home, "alpha-2")
    monkeypatch.chdir("/")
    assert resolve("latest").root == b.root
    assert resolve("alpha-1").root == a.root
    assert resolve(str(a.root)).root == a.root
    for text, expected in [("alpha", "fits several runs"), ("alhpa-1", "near: alpha-1"), ("", "no run")]:
        with pytest.raises(UserError, match=expected):
            resolve(text)


def test_ls_shows_what_is_gone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = new_run(home, "mine")
    layout.root.rename(home / "moved")
    assert main(["ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["state"] == "gone"
    assert main(["status", str(home / "moved")]) == 0
    assert "prepared only" in capsys.readouterr().out


def test_status_says_when_sources_disagree(home: Path) -> None:
    layout = new_run(home, "mine")
    assert "prepared only" in read_status(layout).words
    state = RunState.read(layout)
    state.begin("generate", 1)
    state.write(layout)
    me = process.identity(os.getpid())
    write_json(layout.supervisor, me)
    assert read_status(layout).words == "running"
    write_json(layout.supervisor, {**me, "started": me["started"] + 1})  # the id was given to another process
    assert read_status(layout).words == "running, but its supervisor is gone: vqscale requeue mine"
    write_json(layout.supervisor, {**me, "host": "elsewhere"})
    assert "cannot be asked from here" in read_status(layout).words
    state.end("generate", "done")
    state.write(layout)
    assert "lost its marker" in read_status(layout).words


def test_status_reads_events_of_this_attempt(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = new_run(home, "mine")
    events = EventLog(layout.events("generate"), "generate", 1, "images/s", 10)
    events.log(5, rate=1234.0, loss=0.125)
    events.note("checkpoint", 5, committed=True)  # is no progress
    state = RunState.read(layout)
    state.begin("generate", 2)
    state.write(layout)
    assert read_status(layout).stages[0].step is None
    state.begin("generate", 1)
    state.write(layout)
    assert main(["status", "mine", "--json"]) == 0
    stage = json.loads(capsys.readouterr().out)["stages"][0]
    assert (stage["step"], stage["total"], stage["loss"], stage["rate"]) == (5, 10, 0.125, 1234.0)
    assert main(["status", "mine"]) == 0
    printed = capsys.readouterr().out
    for text in ("5/10", "0.125", "1,234 images/s"):
        assert text in printed


def test_plain_lines(home: Path) -> None:
    layout, now = new_run(home, "mine"), [0.0]
    lines = PlainLines(clock=lambda: now[0])
    events = EventLog(layout.events("generate"), "generate", 1, "images/s", 10)
    state = RunState.read(layout)
    assert lines.new(read_status(layout)) == []
    state.begin("generate", 1)
    state.write(layout)
    assert len(lines.new(read_status(layout))) == 1
    events.log(5, rate=10.0, loss=0.5)
    assert lines.new(read_status(layout)) == []
    now[0] = 11.0
    (line,) = lines.new(read_status(layout))
    assert "step 5/10  loss 0.5  10 images/s" in line
    state.end("generate", "failed", "no disk")
    state.write(layout)
    assert "no disk" in lines.new(read_status(layout))[0]
    assert stage_line(read_status(layout).stages[1]).split() == ["pack", "waiting"]


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 65, 3725)] == ["4 s", "1:05", "1:02:05"]


def rank_log(layout: RunLayout, rank: int, name: str, text: str) -> None:
    folder = layout.attempt("generate", 1) / "ranks" / "id_x" / "attempt_0" / str(rank)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def logs_of(layout: RunLayout, **choice: object) -> list[str]:
    printed: list[str] = []
    print_logs(layout, LogChoice(**choice), follow=False, say=lambda line: printed.append(line.plain()))  # type: ignore[arg-type]
    return printed


def test_logs_are_merged_and_marked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = new_run(home, "mine")
    assert main(["logs", "mine"]) == 0
    assert capsys.readouterr().err == "nothing has been written yet; vqscale status mine says what the run waits for\n"
    state = RunState.read(layout)
    state.begin("generate", 1)
    state.end("generate", "failed")
    state.write(layout)
    agent = layout.attempt("generate", 1) / "agent.log"
    agent.parent.mkdir(parents=True)
    agent.write_text("no such module")
    assert logs_of(layout) == ["[generate#1 agent] no such module"]
    rank_log(layout, 0, "stdout.log", "one\n10%\r20%\n")
    rank_log(layout, 1, "stderr.log", "boom")
    rank_log(layout, 1, "error.json", "{}")
    zero, one = "[generate#1 rank 0]", "[generate#1 rank 1]"
    assert logs_of(layout) == [f"{zero} one", f"{zero} 20%", f"{one} boom"]
    assert logs_of(layout, rank=0) == [f"{zero} one", f"{zero} 20%"]
    assert logs_of(layout, failed=True) == [f"{one} boom"]
    assert main(["logs", "mine", "--failed", "--json"]) == 0
    who = {"name": "rank 1", "stage": "generate", "attempt": 1, "task": None, "rank": 1}
    assert json.loads(capsys.readouterr().out) == {"time": None, **who, "text": "boom"}
    for choice, expected in [({"rank": 7}, "ranks: 0, 1"), ({"stage": "pakc"}, "stages: generate")]:
        with pytest.raises(UserError, match=expected):
            logs_of(layout, **choice)
    with pytest.raises(UserError, match="no such attempt"):
        logs_of(layout, stage="pack")


def test_report_rows() -> None:
    report = {"hour_accuracy": 0.91234, "usage_top": 1.0, "note": "x", "seconds": {"pack": 1.0, "prior": 2.5}}
    assert figures(report) == [("hour_accuracy", "0.9123"), ("usage_top", "1"), ("note", "x")]
    assert seconds(report) == [("pack", "1.0"), ("prior", "2.5"), ("all", "3.5")]
