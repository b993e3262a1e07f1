"""Run directories, the index, status and logs, without starting anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import process, registry, snapshot
from launcher.cli import main
from launcher.locks import alone
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


SUBMITS = """
import sys
from launcher import registry
from launcher.cli import main
make, together = registry.make_directory, []
def wait(path):
    if not together:  # until all have chosen, and found it free
        together.append(sys.stderr.write("ready\\n"))
        sys.stdin.readline()
    return make(path)
registry.make_directory = wait
registry.time.strftime = lambda *a: "20260101-000000"
sys.exit(main(["submit", *sys.argv[1:], "--prepare-only", "--json"]))
"""


def at_once(*command_lines: list[str]) -> list[tuple[int, str, str]]:
    """Code, output and errors of submits that have all chosen their directories before the first makes its own."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([sys.executable, "-c", SUBMITS, *line], text=True, **pipes) for line in command_lines]  # type: ignore[call-overload]
    try:
        for one in started:
            assert one.stderr.readline() == "ready\n"
        for one in started:
            one.stdin.write("go\n")
            one.stdin.flush()
        said = [one.communicate(timeout=60) for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    return [(one.returncode, *words) for one, words in zip(started, said, strict=True)]


def test_runs_that_are_submitted_at_once_have_directories_of_their_own(home: Path) -> None:
    recipe = str(write_recipe(home / "r.yaml"))
    ended = at_once(*([recipe, f"seed={seed}"] for seed in (1, 2, 3)))
    assert [code for code, *_ in ended] == [0, 0, 0], ended
    made = [json.loads(out) for _, out, _ in ended]
    stem = "tiny-20260101-000000"
    assert sorted(one["id"] for one in made) == [stem, f"{stem}-2", f"{stem}-3"]
    assert [RunLayout(Path(one["path"])).read_recipe().seed for one in made] == [1, 2, 3]
    assert {(entry.id, str(entry.path)) for entry in registry.entries()} == {(one["id"], one["path"]) for one in made}


@pytest.mark.parametrize("there", [False, True])
def test_a_directory_that_two_ask_for_is_given_to_one(home: Path, there: bool) -> None:
    """A sweep is no exception, nor is an empty folder that is there already."""
    recipe, place = str(write_recipe(home / "r.yaml")), home / "same"
    if there:
        place.mkdir()
    words = [recipe, "--run", str(place)]
    ended = at_once([*words, "seed=1"], [*words, "seed=2"], [*words, "--sweep", "seed=3,4"])
    assert sorted(code for code, *_ in ended) == [0, 2, 2], ended
    refused = [error for code, _, error in ended if code]
    expected = f"error: {place}: another command makes it, or was killed while it did; choose another directory"
    assert [one.startswith(expected) and one.count("\n") == 1 for one in refused] == [True, True], refused
    assert len(registry.everything()) == (3 if (place / "sweep.json").exists() else 1)


def test_ids_are_of_one_at_most(home: Path) -> None:
    """Runs and sweeps have one set of names. What is gone keeps its own, but for a run in the same directory."""
    first = new_run(home, "a/mine")
    assert registry.claim("mine", home / "b/mine", 1.0, "sweep") == "mine-2"
    assert new_run(home, "c/mine").id == "mine-3"
    shutil.rmtree(first.root)
    assert new_run(home, "d/mine").id == "mine-4"
    assert new_run(home, "a/mine").id == "mine"


def test_what_cannot_be_made_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", str(write_recipe(home / "r.yaml")), "--prepare-only"]
    assert main(words) == 0
    (before,) = registry.entries()
    with monkeypatch.context() as broken:
        broken.setattr("launcher.rundir._link_latest", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*words, "--run", str(home / "runs/mine")])
    assert registry.entries() == [before]
    assert sorted(path.name for path in (home / "runs").iterdir()) == sorted(["latest", before.id])
    capsys.readouterr()
    monkeypatch.setenv("VQSCALE_HOME", "/dev/null/x")
    for more in ([], ["--sweep", "seed=1,2"]):
        assert main([*words, "--run", str(home / "mine"), *more]) == 2
        assert capsys.readouterr().err == (
            "error: /dev/null/x/runs: cannot be written (Not a directory); set VQSCALE_HOME to a folder of yours\n"
        )
    assert not (home / "mine").exists()


def test_the_index_is_where_its_variable_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    for text in ("~/index", "index"):
        monkeypatch.setenv("VQSCALE_HOME", text)
        assert registry.home() == home / "index"


def test_a_damaged_file_is_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = new_run(home, "mine")
    new_run(home, "other")
    layout.state.write_text('{"stages": {')
    fault = f"{layout.state}: is not JSON; "
    for command in ("status", "show", "logs", "cancel", "requeue"):
        assert main([command, "mine"]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {fault}"), told
        assert told.count("\n") == 1
    for command in ("ls", "status"):
        assert main([command]) == 0
        lines = capsys.readouterr().out.splitlines()
        (row,) = (line for line in lines if line.startswith("mine "))
        assert "unreadable" in row
        assert any(fault in line for line in lines)
        assert any(line.startswith("other ") for line in lines)
    assert main(["status", "--json"]) == 0
    facts = {one["id"]: one for one in json.loads(capsys.readouterr().out)}
    assert (facts["mine"]["state"], facts["other"]["state"]) == ("unreadable", "waiting")
    assert facts["mine"].keys() == facts["other"].keys()
    layout.info.write_text("{")
    assert main(["plan", str(home / "r.yaml")]) == 0, "another run of the recipe is nobody's concern"


def test_one_command_at_a_time_changes_a_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = new_run(home, "mine")
    with alone(layout.root):
        for command in ("requeue", "cancel"):
            assert main([command, "mine"]) == 2
            assert "another command starts, requeues or cancels it; try again" in capsys.readouterr().err
    assert main(["cancel", "mine"]) == 0


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
