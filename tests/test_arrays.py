"""Stages as arrays: each task has its share, whoever is last finishes the stage, and a kill costs one task."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.backends import slurm_queue
from launcher.backends.slurm import SlurmBackend
from launcher.cli import main
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState, StageState, tasks_left
from launcher.status import read_status
from pipelines import extract_codes
from pipelines.stage import Stage
from tests.recipes import write_recipe
from tests.test_extraction import SHARDS, contents, save_tokenizer
from tests.training_helpers import OneRank, clock_run, end_task, stage_of, task_of, whole_stage
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
ARRAY = {"processes": 1, "threads": 1, "device": "cpu", "stages": {"extract": {"array": 3}}}


class Rank(OneRank):
    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world  # type: ignore[misc]


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4))
def test_every_piece_of_work_is_one_ranks_of_one_task(count: int, tasks: int, world: int) -> None:
    layout, recipe = RunLayout(Path("/none")), None
    shares = [
        Stage("extract", layout.of_task(task), recipe, Rank(rank, world), 1, tasks=tasks).share(count)  # type: ignore[arg-type]
        for task in range(tasks)
        for rank in range(world)
    ]
    assert sorted(piece for share in shares for piece in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def run_task(run: Path, task: int, tasks: int = 3) -> None:
    stage = task_of("extract", run, task, tasks)
    facts = {"stage": "extract", "attempt": 1, "seconds": 1.0 + task, **extract_codes.main(stage)}
    end_task(stage, extract_codes.finish, facts)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = clock_run(tmp_path / "run", **SHARDS)
    save_tokenizer(made, 0)
    return made


def test_an_extraction_in_tasks_is_the_one_in_one_piece(run: Path, tmp_path: Path) -> None:
    whole = clock_run(tmp_path / "whole", **SHARDS)
    save_tokenizer(whole, 0)
    figures = whole_stage(extract_codes, stage_of("extract", whole))
    layout = RunLayout(run)
    for task in (2, 0):
        run_task(run, task)
        assert not layout.done("extract").exists()
        assert not (layout.codes("train") / "manifest.json").exists()
    run_task(run, 1)
    assert contents(run) == contents(whole)
    marker = read_json(layout.done("extract"))
    assert {key: marker[key] for key in figures} == figures
    assert (marker["tasks"], marker["seconds"]) == (3, 3.0)
    assert all(layout.of_task(task).done("extract").exists() for task in range(3))


def test_a_kill_while_the_last_task_finishes_is_made_good_by_its_repetition(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RunLayout(run)

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    for task in (0, 1):
        run_task(run, task)
    with monkeypatch.context() as patch:
        patch.setattr(extract_codes, "write_manifest", dies)
        with pytest.raises(KeyboardInterrupt):
            run_task(run, 2)
    assert not layout.done("extract").exists()
    assert tasks_left(layout, "extract", 3) == [2], "or nobody would finish the stage"
    run_task(run, 2)
    assert layout.done("extract").exists()
    before = contents(run)
    run_task(run, 0)  # one that was started again though it had ended
    assert contents(run) == before


def test_tasks_judge_bad_images_together(run: Path) -> None:
    """Each task alone is within the budget of its own share or not; the whole is judged over all records."""
    for task in (0, 1):
        run_task(run, task)
    record = next((RunLayout(run).codes("train")).glob("*.tar.json"))
    tree = read_json(record)
    write_json(record, {**tree, "skipped": 40, "bad": [[f"k{n}", "decode"] for n in range(40)]})
    with pytest.raises(UserError, match="40 of 90 samples are bad"):
        run_task(run, 2)
    assert not RunLayout(run).done("extract").exists()


@pytest.fixture
def layout(home: Path) -> RunLayout:
    path = write_recipe(home / "r.yaml", resources=ARRAY)
    made = create(make_plan(str(path), run=home / "mine", stages="generate,pack,tokenizer,extract,prior"))
    for stage in ("generate", "pack", "tokenizer"):
        write_json(made.done(stage), {"stage": stage})
    return made


def supervise(layout: RunLayout, *acts: str) -> int:
    command = [sys.executable, "-m", "tests.fake_stages.supervisor", str(layout.root), *acts]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode


def test_on_one_machine_tasks_run_one_after_the_other(layout: RunLayout) -> None:
    assert supervise(layout) == 0
    state = RunState.read(layout).stages["extract"]
    assert (state.state, state.attempt, state.message) == ("done", 1, "3 of 3 tasks done")
    each = [RunState.read(layout.of_task(task)).stages["extract"] for task in range(3)]
    assert all(one.state == "done" for one in each)
    starts = [one.started or 0.0 for one in each]
    ends = [one.ended or 0.0 for one in each]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert RunState.read(layout).stages["prior"].state == "done"


def test_a_task_that_fails_stops_the_run_and_alone_is_repeated(layout: RunLayout) -> None:
    assert supervise(layout, "extract.1=fail") == 1
    state = RunState.read(layout)
    assert state.word == "failed"
    assert state.stages["extract"].message == "1 of 3 tasks done; task 1: the dog ate the shards"
    assert (state.stages["prior"].state, read_status(layout).state) == ("waiting", "failed")
    assert tasks_left(layout, "extract", 3) == [1, 2]
    assert supervise(layout) == 0
    attempts = [RunState.read(layout.of_task(task)).stages["extract"].attempt for task in range(3)]
    assert attempts == [1, 2, 1]


def test_the_state_of_an_array_is_made_of_its_tasks(layout: RunLayout) -> None:
    def said(*words: str) -> StageState:
        for task, word in enumerate(words):
            state = RunState()
            if word != "waiting":
                state.begin("extract", 1)
                if word != "running":
                    state.end("extract", word, "why")  # type: ignore[arg-type]
            state.write(layout.of_task(task))
        return RunState.read(layout).stages["extract"]

    assert said("waiting", "waiting", "waiting").state == "waiting"
    assert said("running", "failed", "waiting").state == "running"
    assert said("done", "waiting", "waiting").state == "running", "Slurm has not started the others yet"
    assert said("done", "failed", "preempted").state == "failed"
    assert said("done", "preempted", "waiting").message == "1 of 3 tasks done; task 1: why"
    assert said("done", "done", "done").state == "done"


def test_what_is_sent_to_slurm(layout: RunLayout, idle_slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = "generate,pack,tokenizer,extract,prior"
    made = make_plan(str(layout.recipe), "devslurm", run=layout.root.with_name("other"), stages=stages)
    scripts = {command.stage: command.script for command in made.commands}
    assert "#SBATCH --array=0-2\n" in scripts["extract"]
    assert "--array" not in scripts["tokenizer"] + scripts["prior"]
    sent: list[list[str]] = []

    def submit(argv: list[str], *rest: Any) -> str:
        sent.append(argv)
        return str(10 * len(sent))

    monkeypatch.setattr(slurm_queue, "submit", submit)
    layout = create(made)
    for stage in ("generate", "pack", "tokenizer"):
        write_json(layout.done(stage), {"stage": stage})
    write_json(layout.of_task(1).done("extract"), {})
    SlurmBackend().submit(layout)
    assert sent[0] == ["sbatch", "--parsable", "--array=0,2", "--hold", str(layout.script("extract"))]
    assert sent[1][2] == "--dependency=afterok:10", "of the whole array"


def test_a_profile_limits_the_tasks_at_a_time(home: Path) -> None:
    (home / "p.yaml").write_text(
        "{name: p, backend: slurm, slurm: {cpus_per_task: 2, stages: {extract: {at_most: 2, partition: cpu}}}}"
    )
    made = make_plan(str(write_recipe(home / "r.yaml", resources=ARRAY)), str(home / "p.yaml"))
    scripts = {command.stage: command.script for command in made.commands}
    assert "#SBATCH --array=0-2%2\n" in scripts["extract"]
    assert "#SBATCH --partition=cpu\n" in scripts["extract"]


def test_an_array_is_one_job_in_the_queue() -> None:
    rows = [("12_0", "COMPLETED"), ("12_1", "FAILED"), ("12_[3-7%2]", "PENDING"), ("9", "RUNNING")]
    as_rows = [(number, slurm_queue.Row(state, "x")) for number, state in rows]
    assert {number: row.state for number, row in slurm_queue._one_each(as_rows).items()} == {
        "12": "PENDING",
        "9": "RUNNING",
    }
    ended = slurm_queue._one_each(as_rows[:2])
    assert (ended["12"].state, ended["12"].alive) == ("FAILED", False)


def test_plan_shows_tasks(layout: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(layout.recipe)]) == 0
    assert "extract    3 tasks of processes: 1 on 1 node" in capsys.readouterr().out
