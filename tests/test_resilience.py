"""Real stages under the real supervisor: preempted, hung, killed, and the nodes that are left going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.rendezvous import agent_arguments, agent_environment
from launcher import process
from launcher.backends.base import STAGE_TAG
from launcher.cli import main
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState
from launcher.status import read_status
from pipelines import generate, pack
from tests.ranks import LIMIT_S, free_port
from tests.recipes import write_recipe
from tests.training_helpers import stage_of
from tests.waiting import until
from vqscale.config.layout import RunLayout
from vqscale.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12

pytestmark = [pytest.mark.fault, pytest.mark.dist]


@pytest.fixture
def layout(home: Path, request: pytest.FixtureRequest) -> Iterator[RunLayout]:
    """A run of two ranks whose images are packed; the parameter is `resources.hang_s`."""
    settings = {"steps": STEPS, "checkpoint_every": 4, "validate_every": STEPS, "picture_every": STEPS}
    recipe = write_recipe(
        home / "r.yaml",
        resources__processes=2,
        resources__hang_s=request.param if hasattr(request, "param") else 300,
        **{f"tokenizer__training__{name}": value for name, value in settings.items()},
    )
    made = create(make_plan(str(recipe), run=home / "mine", stages="generate,pack,tokenizer"))
    for name, stage in (("generate", generate), ("pack", pack)):
        stage.main(stage_of(name, made.root))
        write_json(made.done(name), {"stage": name, "attempt": 0})
    yield made
    process.end_tagged(STAGE_TAG, str(made.root), grace_s=0)


def start(layout: RunLayout, faults: str = "") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "VQSCALE_FAULT": faults, "OMP_NUM_THREADS": "1"}
    with (layout.root / "supervisor.log").open("ab") as log:
        command = [sys.executable, "-m", "launcher.supervise", str(layout.root)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def losses(layout: RunLayout) -> dict[int, set[float]]:
    found: dict[int, set[float]] = {}
    for line in layout.events("tokenizer").read_text().splitlines():
        event = json.loads(line)
        if "loss" in event:
            found.setdefault(event["step"], set()).add(event["loss"])
    return found


def rank_logs(layout: RunLayout) -> str:
    return "\n".join(path.read_text() for path in sorted(layout.stage("tokenizer").rglob("stdout.log")))


def test_a_preempted_run_saves_says_so_and_goes_on(layout: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    # Rank 1 waits at step 5, so that the request comes while the stage trains.
    supervisor = start(layout, "hold:step=5,rank=1")
    until(layout.faults("tokenizer").exists, layout)
    supervisor.send_signal(signal.SIGUSR2)
    assert supervisor.wait(LIMIT_S) == 1
    marker = read_json(layout.preempted("tokenizer"))
    assert 5 < marker["step"] < STEPS
    assert (marker["signal"], marker["lead_s"]) == ("SIGUSR2", 30.0)
    status = read_status(layout)
    assert status.words == f"preempted, vqscale requeue {status.id} goes on"
    assert status.message == f"tokenizer: preempted, saved at step {marker['step']}"
    assert main(["requeue", "mine", "--follow"]) == 0, rank_logs(layout)
    assert f"from step {marker['step']}" in rank_logs(layout)
    assert losses(layout).keys() == set(range(1, STEPS + 1))
    assert all(len(values) == 1 for values in losses(layout).values()), "no step was made twice"
    assert not layout.preempted("tokenizer").exists()


def test_cancelling_saves_too(layout: RunLayout) -> None:
    supervisor = start(layout, "hold:step=5,rank=0")
    until(layout.faults("tokenizer").exists, layout)
    assert main(["cancel", str(layout.root)]) == 0
    assert supervisor.wait(LIMIT_S) == 1
    entry = RunState.read(layout).stages["tokenizer"]
    assert entry.state == "cancelled"
    assert entry.message.startswith("cancelled, saved at step ")


@pytest.mark.parametrize("layout", [10], indirect=True)
def test_a_hanging_rank_is_named_and_leaves_stacks(layout: RunLayout) -> None:
    assert start(layout, "stop:step=5,rank=1").wait(LIMIT_S) == 1
    entry = RunState.read(layout).stages["tokenizer"]
    assert entry.state == "failed"
    assert entry.message.startswith("rank 1 hangs and cannot leave a note, step 5 (collective), no sign of life for")
    stacks = layout.attempt("tokenizer", 1) / "hang/stacks-00000.txt"
    assert "backward" in stacks.read_text() or "optimise" in stacks.read_text()
    assert not process.tagged(STAGE_TAG, str(layout.root)), "the stopped rank too"


def test_a_drill_finds_every_result_identical(layout: RunLayout, capsys: pytest.CaptureFixture[str]) -> None:
    """Short; `make drill` has the long one. Where a save begins, the one before has ended."""
    faults = "kill:step=6,rank=1,point=before-save; kill:step=9,point=during-save; nan:step=6,rank=1"
    code = main(["drill", str(layout.root), "--faults", faults, "--json", f"tokenizer.training.steps={STEPS}"])
    said = capsys.readouterr()
    outcomes = json.loads(said.out)
    assert code == 0, said.err
    assert [outcome["result"] for outcome in outcomes] == [
        "the reference",
        "identical",
        "identical",
        "goes on; a step was left out",
    ]
    assert [outcome["starts"] for outcome in outcomes] == [1, 2, 2, 1]
    assert [tuple(outcome["resumed"]) for outcome in outcomes] == [(), (3,), (6,), ()]


def test_the_node_that_is_left_goes_on(layout: RunLayout) -> None:
    """Two agents stand for two nodes; one of them is lost with its rank, as in a power cut."""
    endpoint = f"127.0.0.1:{free_port()}"
    settings: dict[str, Any] = {"processes": 1, "max_restarts": 2, "nodes": 2, "least_nodes": 1, "endpoint": endpoint}
    stage = ("-m", "--", "pipelines.train_tokenizer", "--run", str(layout.root))
    given = {variable.name: variable.value for variable in agent_environment(grace_s=5)}
    nodes = []
    try:
        for number in range(2):
            # The second node's rank, whichever it is, stops for good where the save behind step 8 begins, and the one
            # behind step 4 has ended; then that node is taken away.
            faults = "; ".join(f"stop:step=8,rank={rank},point=before-save" for rank in range(2)) if number else ""
            own = {"NODE_OF_TEST": f"{layout.root}/{number}", "VQSCALE_FAULT": faults}
            arguments = agent_arguments(rdzv_id="elastic", holds_store=not number, **settings)
            environment = {**os.environ, **given, **own, STAGE_TAG: str(layout.root), "OMP_NUM_THREADS": "1"}
            log = (layout.root / f"node-{number}.log").open("wb")
            command = [sys.executable, "-m", "torch.distributed.run", *arguments, *stage]
            nodes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
            log.close()
        until(layout.faults("tokenizer").exists, layout)
        for pid in process.tagged("NODE_OF_TEST", f"{layout.root}/1"):
            os.kill(pid, signal.SIGKILL)
        until(layout.done("tokenizer").exists, layout)
        assert nodes[0].wait(LIMIT_S) == 0
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    text = (layout.root / "node-0.log").read_text()
    assert "1 ranks on cpu, from step 4" in text
    assert set(losses(layout)) == set(range(1, STEPS + 1))
