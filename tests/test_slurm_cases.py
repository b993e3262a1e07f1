"""What befalls jobs on a real Slurm whose nodes are hosts with a network of their own: each case with its figures.

The losses of every step are compared, bit for bit, with those of an undisturbed run. Each test prints a row of the
table in docs/cluster.md (`pytest -m root tests/test_slurm_cases.py -s`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from cluster import netns
from cluster.devslurm import INSTALL, DevSlurm, missing
from cluster.profile import PROFILES
from launcher import process
from launcher.backends import slurm_queue
from launcher.backends.base import STAGE_TAG
from launcher.cli import main
from launcher.keeper import TAG
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState, StageState
from launcher.status import read_status
from tests.recipes import write_recipe
from tests.test_slurm import packed, queue, vqscale
from tests.waiting import told, until
from vqscale.config.layout import RunLayout
from vqscale.files import read_json, write_json

STEPS = 24
EVERY = 6  # steps between two checkpoints

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.fault,
    pytest.mark.skipif(bool(missing()), reason=f"{', '.join(missing())} not installed ({INSTALL})"),
    pytest.mark.skipif(bool(netns.missing()), reason=netns.missing()),
]


@dataclass
class Cluster:
    """A throw-away Slurm of three hosts."""

    home: Path
    made: DevSlurm

    def power_off(self, name: str) -> None:
        """As a power cut: the cable goes first, so that nobody hears the sockets close."""
        assert self.made.hosts
        self.made.hosts.link(name, up=False)
        self.kill(name)

    def kill(self, name: str) -> None:
        """End all processes of a host."""
        for pid in process.tagged(TAG, str(self.made.root)):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[0] == b"unshare" and name.encode() in words:
                os.kill(pid, signal.SIGKILL)

    def restore(self) -> None:
        """Cables in, hosts up, nodes back."""
        assert self.made.hosts
        for name in self.made.names:
            self.made.hosts.link(name, up=True)


@pytest.fixture
def cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Each test has hosts of its own, since it may lose some; none of their processes is left afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        up = vqscale("cluster", "up", "--nodes", "3", "--hosts", home=folder)
        try:
            assert up.returncode == 0, up.stderr
            facts = read_json(folder / "devslurm.json")
            made = DevSlurm(Path(facts["dir"]), facts["nodes"], facts["network"])
            monkeypatch.setenv("SLURM_CONF", str(made.conf))
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
            slurm_queue._forget()
            yield Cluster(folder, made)
        finally:
            down = vqscale("cluster", "down", home=folder)
        assert down.returncode == 0, down.stderr
        assert not process.tagged(TAG, str(made.root))


def prepare(
    home: Path, name: str = "mine", stages: str = "generate,pack,tokenizer", steps: int = STEPS, timeout_s: int = 50
) -> RunLayout:
    """A run of two ranks, each on a host of its own, ready for its tokenizer; `timeout_s` is that of collectives."""
    profile = yaml.safe_load((PROFILES / "devslurm.yaml").read_text())
    profile["environment"]["GLOO_SOCKET_IFNAME"] = "eth0"
    profile["slurm"]["pause_s"] = 2
    (home / "hosts.yaml").write_text(yaml.safe_dump(profile))
    path = write_recipe(
        home / "r.yaml",
        resources={"processes": 2, "threads": 1, "device": "cpu", "timeout_s": timeout_s, "hang_s": 60},
        data__streams=6,
        data__clocks={"train": 96, "validation": 24, "shards": 6},
        tokenizer__training__steps=steps,
        tokenizer__training__checkpoint_every=EVERY,
        tokenizer__training__validate_every=steps,
        tokenizer__training__picture_every=steps,
        tokenizer__training__global_batch=12,
        prior__training__global_batch=12,
    )
    return packed(home, path, stages=stages, on=str(home / "hosts.yaml"), name=name)


def losses(layout: RunLayout) -> list[tuple[int, float]]:
    """(step, loss) of all attempts, in the order in which they were made."""
    found = []
    for line in layout.events("tokenizer").read_text().splitlines():
        event = json.loads(line)
        if "loss" in event:
            found.append((event["step"], event["loss"]))
    return found


@pytest.fixture(scope="module")
def undisturbed() -> list[tuple[int, float]]:
    """The losses that every other run has to have."""
    return []


def start(layout: RunLayout, monkeypatch: pytest.MonkeyPatch, faults: str) -> str:
    """Start the run, and wait until the fault has come that makes room for what the test does; returns the job."""
    monkeypatch.setenv("VQSCALE_FAULT", faults)
    assert main(["requeue", str(layout.root)]) == 0
    until(layout.faults("tokenizer").exists, layout)
    return str(read_json(layout.slurm)["jobs"]["tokenizer"])


def entry(layout: RunLayout) -> StageState:
    return RunState.read(layout).stages["tokenizer"]


def finish(layout: RunLayout, case: str, undisturbed: list[tuple[int, float]], began: float) -> int:
    """Wait for the end, compare, print the row; returns the number of steps that were made twice."""
    until(lambda: read_status(layout).over, layout)
    assert read_status(layout).state == "done", told(layout)
    made = losses(layout)
    assert set(made) == set(undisturbed), f"{case}: losses differ\n{told(layout)}"
    lost = len(made) - STEPS
    until(lambda: not process.tagged(STAGE_TAG, str(layout.root)), layout)
    until(lambda: not queue(), layout)
    print(f"\n| {case} | {entry(layout).attempt} | {lost} | done | {time.monotonic() - began:.0f} |")
    return lost


@pytest.fixture
def reference(cluster: Cluster, home: Path, undisturbed: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Made once, by the first test that asks for it."""
    if not undisturbed:
        layout, began = prepare(home, "undisturbed"), time.monotonic()
        assert main(["requeue", str(layout.root)]) == 0
        until(lambda: read_status(layout).over, layout)
        undisturbed += losses(layout)
        assert [step for step, _ in undisturbed] == list(range(1, STEPS + 1)), told(layout)
        finish(layout, "undisturbed", undisturbed, began)
    return undisturbed


def held(home: Path) -> str:
    """The fault that makes room for what a test does, three steps behind the checkpoint of step 12: see `go_on`."""
    return f"hold:step=15,rank=1,file={home / 'go-on'}"


def go_on(home: Path) -> None:
    """The test has done it; whom a request to stop reaches goes on by itself."""
    (home / "go-on").touch()


def test_preempted_by_signal(
    cluster: Cluster, home: Path, reference: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, began = prepare(home), time.monotonic()
    job = start(layout, monkeypatch, held(home))
    subprocess.run(["scancel", "--batch", "--signal=USR2", job], check=True)
    assert finish(layout, "preempted by a signal", reference, began) == 0
    assert entry(layout).attempt == 2


def test_requeued_by_hand(
    cluster: Cluster, home: Path, reference: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, began = prepare(home), time.monotonic()
    job = start(layout, monkeypatch, held(home))
    subprocess.run(["scontrol", "requeue", job], check=True)
    assert finish(layout, "requeued by hand (`scontrol requeue`)", reference, began) <= EVERY
    assert entry(layout).attempt == 2


@pytest.mark.parametrize(
    ("host", "case"), [("node2", "a host"), ("node1", "rank 0's host, which watches over the job")]
)
def test_powered_off(
    cluster: Cluster,
    home: Path,
    reference: list[tuple[int, float]],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    case: str,
) -> None:
    layout, began = prepare(home, timeout_s=15), time.monotonic()
    start(layout, monkeypatch, held(home))
    cluster.power_off(host)
    go_on(home)
    assert finish(layout, f"power cut of {case}", reference, began) <= EVERY
    assert entry(layout).attempt == 2
    used = read_json(layout.attempt("tokenizer", 2) / "nodes.json")
    assert host not in used
    (once,) = read_json(layout.requeues("tokenizer"))["tries"]
    assert once["kind"] == "node"
    assert host in once["message"]


def test_drained(
    cluster: Cluster, home: Path, reference: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, began = prepare(home, stages="generate,pack,tokenizer,extract"), time.monotonic()
    start(layout, monkeypatch, held(home))
    subprocess.run(["scontrol", "update", "nodename=node1", "state=drain", "reason=test"], check=True)
    go_on(home)
    assert finish(layout, "a node is drained: the job ends there, the next one goes elsewhere", reference, began) == 0
    nodes = {stage: read_json(layout.attempt(stage, 1) / "nodes.json") for stage in ("tokenizer", "extract")}
    assert nodes == {"tokenizer": ["node1", "node2"], "extract": ["node2", "node3"]}


@pytest.mark.parametrize("seconds", [4, 20, 75])
def test_link_down(
    cluster: Cluster, home: Path, reference: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    layout, began = prepare(home, timeout_s=50 if seconds == 4 else 15), time.monotonic()
    start(layout, monkeypatch, held(home))
    assert cluster.made.hosts
    cluster.made.hosts.link("node2", up=False)
    go_on(home)
    time.sleep(seconds)  # what is measured, not a wait for something
    cluster.made.hosts.link("node2", up=True)
    lost = finish(layout, f"a cable out for {seconds} s", reference, began)
    assert lost == 0 if seconds == 4 else lost <= EVERY


def test_a_users_error(cluster: Cluster, home: Path) -> None:
    layout = create(make_plan(str(_recipe_of(home)), str(home / "hosts.yaml"), run=home / "mine", stages=BEGIN))
    for name in ("generate", "pack"):  # but there are no shards
        write_json(layout.done(name), {"stage": name, "attempt": 0})
    began = time.monotonic()
    assert main(["requeue", str(layout.root)]) == 0
    until(lambda: read_status(layout).over, layout)
    assert (entry(layout).state, entry(layout).attempt) == ("failed", 1), told(layout)
    print(f"\n| a fault of the user's | 1 | 0 | failed: {entry(layout).message} | {time.monotonic() - began:.0f} |")


def test_no_progress(cluster: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails before its first checkpoint, each time."""
    layout, began = prepare(home), time.monotonic()
    start(layout, monkeypatch, "exception:step=3,rank=0; exception:step=4,rank=0; exception:step=5,rank=0")
    until(lambda: read_status(layout).over, layout)
    found = entry(layout)
    assert (found.state, found.attempt) == ("failed", 2), told(layout)
    assert found.message.endswith("not requeued: failed 2 times in a row without progress")
    made = losses(layout)
    lost = len(made) - len({step for step, _ in made})
    until(lambda: not queue(), layout)
    print(f"\n| fails again and again before a checkpoint | 2 | {lost} | failed | {time.monotonic() - began:.0f} |")


BEGIN = "generate,pack,tokenizer"


def _recipe_of(home: Path) -> Path:
    prepare(home, "unused")
    return home / "r.yaml"
