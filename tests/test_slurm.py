"""Runs under a real Slurm of three nodes on this machine: a chain of jobs, preemption, failure, cancelling."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.devslurm import INSTALL, DevSlurm, missing
from cluster.profile import PROFILES
from launcher import process
from launcher.backends import slurm_jobs, slurm_queue
from launcher.backends.base import STAGE_TAG
from launcher.cli import main
from launcher.keeper import TAG
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState
from launcher.status import read_status
from pipelines import generate, pack
from tests.recipes import write_recipe
from tests.training_helpers import stage_of
from tests.waiting import told, until
from vqscale.config.layout import RunLayout
from vqscale.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.dist,
    pytest.mark.skipif(bool(missing()), reason=f"{', '.join(missing())} not installed ({INSTALL})"),
]


def vqscale(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *words]
    environment = {**os.environ, "VQSCALE_HOME": str(home)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """The home of a throw-away Slurm that is up; its path is short, as a socket's has to be."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        up = vqscale("cluster", "up", home=home)
        try:
            assert up.returncode == 0, up.stderr
            yield home
        finally:
            down = vqscale("cluster", "down", home=home)
            left = process.tagged(TAG, str(home / "devslurm"))
        assert down.returncode == 0, down.stderr
        assert not left, "daemons and slurmstepd too"


@pytest.fixture
def conf(cluster: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs of this test go to the cluster; their jobs end with it."""
    path = cluster / "devslurm/etc/slurm.conf"
    monkeypatch.setenv("SLURM_CONF", str(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    slurm_queue._forget()
    yield path
    DevSlurm(cluster / "devslurm", nodes=3).drain()


def recipe(home: Path, processes: int, **training: object) -> Path:
    set_here = {"steps": STEPS, "checkpoint_every": 4, "validate_every": STEPS, "picture_every": STEPS, **training}
    return write_recipe(
        home / "r.yaml",
        resources={"processes": processes, "threads": 1, "device": "cpu"},
        data__streams=6,
        data__clocks={"train": 96, "validation": 24, "shards": 6},
        **{f"tokenizer__training__{name}": value for name, value in set_here.items()},
        tokenizer__training__global_batch=12,
        prior__training__global_batch=12,
    )


def packed(
    home: Path,
    path: Path,
    stages: str = "generate,pack,tokenizer",
    on: str = "devslurm",
    name: str = "mine",
    done: tuple[str, ...] = ("generate", "pack"),
) -> RunLayout:
    """A run whose first stages are done, ready for `requeue`."""
    layout = create(make_plan(str(path), on, run=home / name, stages=stages))
    for stage, module in (("generate", generate), ("pack", pack)):
        if stage in done:
            module.main(stage_of(stage, layout.root))
            write_json(layout.done(stage), {"stage": stage, "attempt": 0})
    return layout


def queue() -> dict[str, str]:
    """The jobs that Slurm has not let go of; one that has ended stays a moment longer, as COMPLETING."""
    return {number: row.state for number, row in slurm_queue.jobs(fresh=True).items() if row.alive}


def test_a_chain_on_three_nodes_ends_done(conf: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under names that neither the shell nor sbatch may read as anything else."""
    profile = yaml.safe_load((PROFILES / "devslurm.yaml").read_text())
    profile["environment"]["HOSTILE"] = "x\n#SBATCH --nodes=99\n'; exit 1; '"
    (home / "own.yaml").write_text(yaml.safe_dump(profile))
    layout = packed(
        home, recipe(home, 3, steps=4), name="it's; a $(run)", on=str(home / "own.yaml"), done=("generate",)
    )
    assert main(["requeue", str(layout.root), "--follow"]) == 0, told(layout)
    status = read_status(layout)
    assert (status.words, [stage.state for stage in status.stages]) == ("done", ["done"] * 3)
    assert list(read_json(layout.slurm)["jobs"]) == ["pack", "tokenizer"]
    capsys.readouterr()
    assert main(["logs", str(layout.root), "--stage", "tokenizer"]) == 0
    assert "3 ranks on cpu" in capsys.readouterr().out, told(layout)
    notes = sorted(layout.attempt("tokenizer", 1).glob("ranks/*/attempt_0/0/rank"))
    assert sorted(note.read_text() for note in notes) == ["0", "1", "2"], "one agent a node, logs by rank"
    assert not process.tagged(STAGE_TAG, str(layout.root))


@pytest.mark.fault
def test_a_preempted_job_goes_on_by_itself(conf: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = packed(home, recipe(home, 2))
    # Rank 1 waits at step 5, so that the request comes while the stage trains.
    monkeypatch.setenv("VQSCALE_FAULT", "hold:step=5,rank=1")
    assert main(["requeue", "mine"]) == 0
    job = read_json(layout.slurm)["jobs"]["tokenizer"]
    until(layout.faults("tokenizer").exists, layout)
    subprocess.run(["scancel", "--batch", "--signal=USR2", job], check=True)
    until(lambda: RunState.read(layout).stages["tokenizer"].attempt == 2, layout)
    (once,) = read_json(layout.requeues("tokenizer"))["tries"]
    assert 5 < once["step"] < STEPS
    until(layout.done("tokenizer").exists, layout)
    until(lambda: job not in queue(), layout)
    assert read_status(layout).words == "done"
    events = [json.loads(line) for line in layout.events("tokenizer").read_text().splitlines()]
    steps = [event["step"] for event in events if "loss" in event]
    assert sorted(steps) == list(range(1, STEPS + 1)), "no step was lost or made twice"
    assert "DUE TO JOB REQUEUE" in layout.log.read_text(), "the logs of both starts are in one file"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault
def test_a_time_limit_is_announced(conf: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Slurm itself, with the signal that the profile names; a training longer than the limit goes on to its end.

    Slurm may say it a minute early, so the first start has between one and two and a half minutes.
    """
    profile = yaml.safe_load((PROFILES / "devslurm.yaml").read_text())
    profile["slurm"] |= {"time_min": 3, "signal": "USR1"}
    (home / "short.yaml").write_text(yaml.safe_dump(profile))
    layout = packed(home, recipe(home, 2, steps=30), on=str(home / "short.yaml"))
    # Shorter than the grace: a rank that sleeps cannot save.
    monkeypatch.setenv("VQSCALE_FAULT", "; ".join(f"slow:step={step},rank=1,seconds=7" for step in range(3, 28)))
    assert main(["requeue", "mine"]) == 0
    until(layout.done("tokenizer").exists, layout, 560)
    tries = read_json(layout.requeues("tokenizer"))["tries"]
    assert {one["kind"] for one in tries} == {"preempted"}, told(layout)
    steps = [one["step"] or 0 for one in tries]  # nothing is saved where it is said while the first start imports torch
    assert steps == sorted(set(steps)), "each start got on"
    assert 0 < steps[-1] < 30
    events = [json.loads(line) for line in layout.events("tokenizer").read_text().splitlines()]
    assert sorted(event["step"] for event in events if "loss" in event) == list(range(1, 31))
    assert "TIME LIMIT" not in layout.log.read_text(), "it was never too late"


@pytest.mark.fault
def test_a_users_fault_ends_the_chain(conf: Path, home: Path) -> None:
    layout = create(
        make_plan(str(recipe(home, 1)), "devslurm", run=home / "mine", stages="generate,pack,tokenizer,extract")
    )
    for name in ("generate", "pack"):  # but there are no shards
        write_json(layout.done(name), {"stage": name, "attempt": 0})
    assert main(["requeue", "mine", "--follow"]) == 1
    assert read_json(layout.failure("tokenizer"))["kind"] == "user", told(layout)
    entries = RunState.read(layout).stages
    assert (entries["tokenizer"].state, entries["tokenizer"].attempt) == ("failed", 1)
    assert entries["extract"].state == "waiting"
    assert not layout.requeues("tokenizer").exists()
    until(lambda: not queue(), layout)  # the jobs that waited for it are gone


@pytest.mark.fault
def test_cancelling_leaves_no_process(conf: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = packed(home, recipe(home, 3, steps=1_000_000), stages="generate,pack,tokenizer,extract")
    assert main(["requeue", "mine"]) == 0
    until(layout.events("tokenizer").exists, layout)
    assert main(["requeue", "mine"]) == 2
    assert "is running" in capsys.readouterr().err
    assert process.tagged(STAGE_TAG, str(layout.root)), "or the last line would prove nothing"
    assert main(["cancel", "mine"]) == 0
    assert not process.tagged(STAGE_TAG, str(layout.root))
    until(lambda: not queue(), layout)
    entry = RunState.read(layout).stages["tokenizer"]
    assert entry.state == "cancelled", told(layout)
    assert entry.message.startswith("cancelled, saved at step ")
    assert read_status(layout).words == "cancelled"


@pytest.mark.slow
@pytest.mark.fault
def test_a_run_goes_on_after_a_lost_node(conf: Path, home: Path) -> None:
    layout = packed(home, recipe(home, 2, steps=1_000_000))
    assert main(["requeue", "mine"]) == 0
    until(lambda: sorted((layout.root / "checkpoints/tokenizer").glob("step-*")), layout)
    subprocess.run(["scontrol", "update", "nodename=node1", "state=down", "reason=test"], check=True)
    until(lambda: "from step" in "".join(map(Path.read_text, second_start(layout))), layout)
    # Slurm requeued it; the next start puts that down where the first was killed before it could say how it ended.
    tries = (read_json(layout.requeues("tokenizer")) or {"tries": []})["tries"]
    assert all(one["message"].endswith("started again by Slurm") for one in tries)
    assert main(["cancel", "mine"]) == 0


def second_start(layout: RunLayout) -> list[Path]:
    return sorted(layout.attempt("tokenizer", 2).rglob("stdout.log"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_as_a_chain_ends_with_the_same_report(
    conf: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All seven stages on three nodes, extraction as an array, against one machine; the recipe is shortened."""
    short = [
        "data.clocks={train: 480, validation: 48, shards: 24}",
        "tokenizer.quantizer.continuous_steps=5",
        *(f"{stage}.training.{what}=20" for stage in ("tokenizer", "prior") for what in ("steps", "picture_every")),
        "sample.per_class=2",
        "resources.stages.extract.array=3",
        # `auto` may settle otherwise for the nodes than for this machine.
        *(f"{stage}.training.precision=fp32" for stage in ("tokenizer", "prior")),
    ]
    reports = {}
    for name in ("local", "devslurm"):
        where = ["--on", name, "--run", str(home / name), "--follow"]
        assert main(["submit", "quickstart", *where, *short]) == 0, told(RunLayout(home / name))
        reports[name] = read_json(RunLayout(home / name).report)
    assert list(reports["local"]) == list(reports["devslurm"])
    different = {key for key, value in reports["local"].items() if reports["devslurm"][key] != value}
    clocks = {"seconds", "sampling_images_per_s"}
    assert different <= {"run", *clocks}, "every figure is the same in all its digits"
    assert list(reports["devslurm"]["seconds"]) == list(reports["local"]["seconds"])
    assert len(read_json(RunLayout(home / "devslurm").slurm)["jobs"]) == 7


def test_what_slurm_refuses_is_one_line(conf: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(home, 6)  # more nodes than there are
    assert main(["submit", str(path), "--on", "devslurm", "--run", str(home / "mine")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: sbatch: ")
    assert told.count("\n") == 1
    assert not (home / "mine").exists(), "the same command can be repeated"


def test_a_job_that_nobody_recorded_is_ended(conf: Path, home: Path) -> None:
    """As a submission leaves it that is killed behind `sbatch`."""
    layout = packed(home, recipe(home, 1), stages="generate,pack", done=("generate",))
    name = slurm_jobs.job_name(layout.root, "pack")
    argv = ["sbatch", "--parsable", "--hold", f"--job-name={name}", "--wrap", "true"]
    left = slurm_queue.submit(argv, layout.root, os.environ)
    elsewhere = slurm_queue.submit(argv, home, os.environ)
    assert read_status(layout).words.endswith("prepared only: vqscale requeue mine starts it")
    assert main(["requeue", "mine"]) == 0
    recorded = read_json(layout.slurm)["jobs"]["pack"]
    assert left not in queue()
    assert elsewhere in queue(), "of another folder"
    assert len({left, elsewhere, recorded}) == 3
    until(lambda: read_status(layout).over, layout)
    assert read_status(layout).words == "done", told(layout)


@pytest.mark.fault
def test_a_killed_keeper_takes_its_daemons_along() -> None:
    with tempfile.TemporaryDirectory() as name:
        home, tag = Path(name), f"{name}/devslurm"
        try:
            up = vqscale("cluster", "up", "--nodes", "1", home=home)
            assert up.returncode == 0, up.stderr
            assert len(process.tagged(TAG, tag)) >= 3, "munged, slurmctld, slurmd"
            os.kill(read_json(home / "devslurm.json")["keeper"]["pid"], signal.SIGKILL)
            until(lambda: not process.tagged(TAG, tag))
            assert vqscale("cluster", "status", home=home).returncode == 1
        finally:
            assert vqscale("cluster", "down", home=home).returncode == 0


def test_the_cluster_is_found_from_anywhere(cluster: Path) -> None:
    status = vqscale("cluster", "status", home=cluster)
    assert status.returncode == 0
    assert status.stdout.count("idle") + status.stdout.count("comp") >= 1
    assert f"export SLURM_CONF={cluster}/devslurm/etc/slurm.conf" in status.stdout
    assert vqscale("cluster", "status", "--conf", home=cluster).stdout.strip().endswith("etc/slurm.conf")
    again = vqscale("cluster", "up", home=cluster)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "is up already" in again.stderr


def test_the_doctor_asks_the_nodes(conf: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--on", "devslurm", "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    told = {(one["where"], one["check"]): one["value"] for one in verdicts}
    assert told["all nodes", "nodes"] == "2 of 2 answered"
    assert told["all nodes", "shared folder"].endswith("each sees the others' files")
    assert told["all nodes", "rendezvous"].startswith("2 ranks over gloo")
    assert told["here", "partition main"] == "3 of 3 nodes take jobs"
    assert len({where for where, check in told if check == "clock offset"}) == 2
    until(lambda: not queue(), RunLayout(home))


def test_the_doctor_finds_a_node_that_differs(conf: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one of two nodes another version of a package comes first on the path."""
    planted = home / "planted/rich-0.0.1.dist-info"
    planted.mkdir(parents=True)
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: rich\nVersion: 0.0.1\n")
    profile = yaml.safe_load((PROFILES / "devslurm.yaml").read_text())
    profile["slurm"]["setup"] = [f'if [ "$SLURM_NODEID" = 1 ]; then export PYTHONPATH={planted.parent}; fi']
    profile["floors"] = {"all_reduce_gb_s": 1e6}
    (home / "own.yaml").write_text(yaml.safe_dump(profile))
    assert main(["doctor", "--on", str(home / "own.yaml"), "--json"]) == 1
    failed = {one["check"]: one["value"] for one in json.loads(capsys.readouterr().out) if one["word"] == "FAIL"}
    assert list(failed) == ["equal versions", "all-reduce"]
    assert failed["equal versions"].startswith("rich 0.0.1 on node")
    until(lambda: not queue(), RunLayout(home))


def test_nodes_that_slurm_does_not_give(conf: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--on", "devslurm", "--nodes", "5"]) == 1
    assert "FAIL  here       partition main   3 of 3 nodes take jobs  (at least 5)" in capsys.readouterr().out
    busy = subprocess.Popen(["srun", "--nodes=3", "--exclusive", "sleep", "600"])
    try:
        until(lambda: "RUNNING" in queue().values(), RunLayout(home))
        assert main(["doctor", "--on", "devslurm", "--wait", "2"]) == 1
        assert "FAIL  all nodes  nodes            0 of 2 answered: srun: error: " in capsys.readouterr().out
        until(lambda: len(queue()) == 1, RunLayout(home))  # it waits for them no longer
    finally:
        busy.terminate()
        busy.wait()
