"""Sweeps: the product of settings as runs of their own, all checked before one is made, so many started at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher import process, registry, sweep, sweeper
from launcher.backends import slurm_queue
from launcher.backends.base import STAGE_TAG, Poll
from launcher.cli import main
from launcher.state import RunState
from launcher.status import read_status
from launcher.sweep import Sweep, parse_axis, points
from tests.recipes import write_recipe
from tests.waiting import until
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json


@pytest.mark.parametrize(
    ("text", "key", "values"),
    [
        ("seed=1,2", "seed", ["1", "2"]),
        ("seed=1", "seed", ["1"]),
        ("a.b=[0.9, 0.99],[0.8,0.9]", "a.b", ["[0.9, 0.99]", "[0.8,0.9]"]),
        ("a='x,y',z", "a", ["'x,y'", "z"]),
        ("a={k: 1, l: 2},null", "a", ["{k: 1, l: 2}", "null"]),
    ],
)
def test_an_axis(text: str, key: str, values: list[str]) -> None:
    assert parse_axis(text) == (key, values)


@pytest.mark.parametrize("text", ["seed", "=1", "seed=", "seed=1,,2", "seed=1,1"])
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(UserError, match="--sweep"):
        parse_axis(text)


def test_the_product_of_all_axes() -> None:
    assert points([("a", ["1", "2"]), ("b", ["x", "y"])]) == [
        ("a=1", "b=x"),
        ("a=1", "b=y"),
        ("a=2", "b=x"),
        ("a=2", "b=y"),
    ]
    with pytest.raises(UserError, match="swept twice"):
        points([("a", ["1"]), ("a", ["2"])])
    with pytest.raises(UserError, match="1,024 runs; sweep at most 1,000"):
        points([(name, ["0", "1"]) for name in "abcdefghij"])


@pytest.fixture
def words(home: Path) -> list[str]:
    """The command line behind `plan` or `submit`: four runs."""
    path = str(write_recipe(home / "r.yaml"))
    axes = ["--sweep", "prior.networks.0.layers=1,2", "--sweep", "seed=1,2"]
    return [path, "--run", str(home / "tries"), "--stages", "generate,pack", *axes]


def test_plan_lists_the_runs(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words, "sample.per_class=3"]) == 0
    text = capsys.readouterr().out
    assert "4 runs, 1 at a time" in text
    assert "tries.2  prior.networks.0.layers=2 seed=1\n" in text
    assert main(["plan", *words, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [one["overrides"] for one in runs][-1] == ["prior.networks.0.layers=2", "seed=2"]
    assert not (home / "tries").exists()


def test_one_bad_run_and_none_is_made(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_recipe(home / "r.yaml"))
    assert main(["submit", path, "--run", str(home / "tries"), "--sweep", "prior.networks.0.heads=1,2,3"]) == 2
    assert "width 16 is not divisible by heads 3" in capsys.readouterr().err
    assert not (home / "tries").exists()


def test_words_that_do_not_go_together(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--follow"], ["--at-most", "0"]):
        assert main(["submit", *words, *more]) == 2
    assert main(["submit", words[0], "--at-most", "2"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_runs_are_runs_like_others(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *words, "--prepare-only"]) == 0
    folder = home / "tries"
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "sweep.json", *(f"tries.{n}" for n in range(4))]
    recipes = [RunLayout(folder / f"tries.{n}").read_recipe() for n in range(4)]
    assert [(recipe.prior.networks[0].layers, recipe.seed) for recipe in recipes] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    capsys.readouterr()
    assert main(["ls", "--name", "tries.*", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 4
    assert main(["cancel", "tries"]) == 0
    assert capsys.readouterr().out == "tries: 4 runs cancelled\n"
    assert read_status(RunLayout(folder / "tries.3")).state == "cancelled"


@pytest.mark.parametrize("command", ["logs", "show", "trace", "drill", "checkpoints ls", "sample", "evaluate"])
def test_commands_for_one_run_name_those_of_a_sweep(
    command: str, words: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words, "--prepare-only"]) == 0
    capsys.readouterr()
    for text in ("tries", str(home / "tries")):
        assert main([*command.split(), text]) == 2
        line = capsys.readouterr().err
        assert line == (
            f"error: {text}: is a sweep of 4 runs, and one run is asked for; "
            "name one of them: tries.0, tries.1, tries.2, tries.3\n"
        )


def test_a_name_is_a_path_first_and_one_sweep_or_run(
    words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run and a sweep of equal names in two places: each command is for the one that it names."""
    assert main(["submit", words[0], "--run", str(home / "a/tries"), "--prepare-only"]) == 0
    words[words.index("--run") + 1] = str(home / "b/tries")
    assert main(["submit", *words, "--prepare-only"]) == 0
    run, folder = RunLayout(home / "a/tries"), home / "b/tries"
    assert (run.id, Sweep(**read_json(folder / "sweep.json")).id) == ("tries", "tries-2")
    assert sweep.find("tries") is None
    for text in (str(run.root), f"{home}/c/tries", "c/tries", ""):
        assert sweep.find(text) is None, text
    monkeypatch.chdir(home / "a")
    for text in ("tries-2", str(folder), "../b/tries"):
        found = sweep.find(text)
        assert found
        assert found[0] == folder
    capsys.readouterr()
    assert main(["cancel", str(run.root)]) == 0
    assert capsys.readouterr().out.startswith("tries: cancelled")
    assert read_status(RunLayout(folder / "tries.0")).state == "waiting"


def test_a_run_that_is_missing_keeps_no_other_from_anything(
    words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words, "--prepare-only", "--at-most", "4"]) == 0
    folder, fake = home / "tries", Fake()
    shutil.rmtree(folder / "tries.1")
    (folder / "tries.2/state.json").write_text("{")
    capsys.readouterr()

    assert main(["status", "tries"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["tries.0", "waiting"],
        ["tries.1", "unreadable"],
        ["tries.2", "unreadable"],
        ["tries.3", "waiting"],
    ]
    missing = f"{folder}/tries.1: holds no run"
    assert any(missing in line for line in lines)

    with monkeypatch.context() as faked:
        faked.setattr(sweeper, "_backend", lambda layout: fake)
        faked.setattr("launcher.status.backend_for", lambda profile: fake)
        faked.setattr(sweeper, "_POLL_S", 0)
        faked.setattr("launcher.family.write_comparison", no_page)
        assert sweeper.run(folder) == 1
    assert sorted(group[-1] for group in fake.together) == ["tries.0", "tries.3"]
    log = capsys.readouterr().out
    assert f"left out: {missing}" in log
    assert f"warning: {folder}: the comparison was not written" in log

    for number in (0, 3):
        layout = RunLayout(folder / f"tries.{number}")
        state = RunState.read(layout)
        for stage in state.stages:
            layout.done(stage).unlink()
        state.reopen(layout)
        state.write(layout)
    started: list[str] = []
    monkeypatch.setattr(sweeper, "start", lambda folder, found, left: started.extend(one.root.name for one in left))
    for command, told in (("requeue", "tries goes on with 2 runs\n"), ("cancel", "tries: 2 runs cancelled\n")):
        assert main([command, "tries"]) == 2
        out, err = capsys.readouterr()
        assert out == told
        faults = sorted(err.splitlines())
        assert faults[0] == f"error: {folder}/tries.1: " + ("holds no run" if command == "requeue" else "is not there")
        assert faults[1].startswith(f"error: {folder}/tries.2/state.json: is not JSON")
    assert started == ["tries.0", "tries.3"]
    assert read_status(RunLayout(folder / "tries.0")).state == "cancelled"


def no_page(folder: Path) -> None:
    raise UserError("the comparison was not written", where=str(folder))


def test_what_is_left_of_a_sweep_goes_on(
    words: list[str], home: Path, idle_slurm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words, "--prepare-only", "--on", "devslurm"]) == 0
    assert "start it:  vqscale requeue tries\n" in capsys.readouterr().out
    folder = home / "tries"
    for number, word in ((0, "done"), (1, "failed")):
        layout = RunLayout(folder / f"tries.{number}")
        state = RunState.read(layout)
        for stage in state.stages:
            state.begin(stage, 1)
            state.end(stage, word)  # type: ignore[arg-type]
            if word == "done":
                write_json(layout.done(stage), {})
        state.write(layout)
    sent: list[str] = []
    monkeypatch.setattr(slurm_queue, "submit", lambda argv, *rest: str(sent.append(argv[-1]) or 10 * len(sent)))
    assert main(["requeue", "tries", "--follow"]) == 2
    assert main(["requeue", "tries"]) == 0
    assert capsys.readouterr().out == "tries goes on with 3 runs\n"
    assert [Path(script).parts[-4] for script in sent[::2]] == ["tries.1", "tries.2", "tries.3"]


class Fake:
    """A backend whose runs end when they are told, and that writes down who ran with whom."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.together: list[list[str]] = []
        self.looks = 0

    def submit(self, layout: RunLayout) -> Poll:
        self.running.append(layout.root.name)
        self.together.append(list(self.running))
        state = RunState.read(layout)
        state.begin("generate", 1)
        state.write(layout)
        return Poll(True, "")

    def poll(self, layout: RunLayout) -> Poll:
        if layout.root.name not in self.running:
            return Poll(False, "", begun=False)
        self.looks += 1
        if self.looks % 2 == 0:  # each is over at its second look
            self.running.remove(layout.root.name)
            state = RunState.read(layout)
            for stage in state.stages:
                state.begin(stage, 1)
                state.end(stage, "done")
                write_json(layout.done(stage), {})
            state.write(layout)
        return Poll(layout.root.name in self.running, "")


@pytest.mark.parametrize("most", [1, 2])
def test_so_many_run_at_a_time(
    words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words, "--prepare-only", "--at-most", str(most)]) == 0
    folder, fake = home / "tries", Fake()
    started = RunLayout(folder / "tries.1")
    state = RunState.read(started)
    state.stop("cancelled", "cancelled")
    state.write(started)
    monkeypatch.setattr(sweeper, "_backend", lambda layout: fake)
    monkeypatch.setattr("launcher.status.backend_for", lambda profile: fake)
    monkeypatch.setattr(sweeper, "_POLL_S", 0)
    assert sweeper.run(folder) == 1, "one was cancelled"
    order = [group[-1] for group in fake.together]
    assert order == ["tries.0", "tries.2", "tries.3"], "one that was cancelled before its turn is left out"
    assert max(map(len, fake.together)) == most


@pytest.mark.dist
def test_on_one_machine_the_others_wait(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *words]) == 0
    folder = home / "tries"
    first, last = RunLayout(folder / "tries.0"), RunLayout(folder / "tries.3")
    until(lambda: read_status(first).state != "waiting", first)
    assert read_status(last).words == "waiting, waits for its turn in sweep tries"
    found = sweep.find("tries")
    assert found
    assert main(["cancel", str(folder)]) == 0
    until(lambda: not process.is_alive(Sweep(**read_json(folder / "sweep.json")).runner))
    for number in range(4):
        layout = RunLayout(folder / f"tries.{number}")
        assert read_status(layout).state in ("cancelled", "done")
        assert not process.tagged(STAGE_TAG, str(layout.root))
    assert read_status(last).words == "cancelled"


def test_a_queue_chains_them(words: list[str], home: Path, idle_slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[str]] = []

    def submit(argv: list[str], *rest: Any) -> str:
        sent.append([word for word in argv if "afterok" in word or "afterany" in word])
        return str(10 * len(sent))

    monkeypatch.setattr(slurm_queue, "submit", submit)
    assert main(["submit", *words, "--on", "devslurm", "--at-most", "2"]) == 0
    assert sent == [
        [],
        ["--dependency=afterok:10"],
        [],
        ["--dependency=afterok:30"],
        ["--dependency=afterany:20"],
        ["--dependency=afterok:50"],
        ["--dependency=afterany:40"],
        ["--dependency=afterok:70"],
    ]
    assert not Sweep(**read_json(home / "tries/sweep.json")).runner, "nobody has to stay"


def test_a_sweep_that_is_refused_leaves_neither_jobs_nor_runs(
    words: list[str], home: Path, idle_slurm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = iter(["10", "20", "30"])
    cancelled: list[str] = []

    def submit(argv: list[str], *rest: Any) -> str:
        try:
            return next(numbers)
        except StopIteration:
            raise UserError("QOSMaxSubmitJobPerUserLimit", where="sbatch") from None

    rows = {str(n): slurm_queue.Row("PENDING", f"vqscale-tries.0-{s}") for n, s in ((10, "generate"), (20, "pack"))}
    monkeypatch.setattr(slurm_queue, "submit", submit)
    monkeypatch.setattr(
        slurm_queue, "jobs", lambda fresh=False: {n: row for n, row in rows.items() if n not in cancelled}
    )
    monkeypatch.setattr(slurm_queue, "cancel", lambda found: cancelled.extend(found))
    assert main(["submit", *words, "--on", "devslurm"]) == 2
    assert sorted(cancelled) == ["10", "20", "30"], "those of a whole chain, and of the one that was refused"
    assert not (home / "tries").exists()
    assert not registry.everything()
