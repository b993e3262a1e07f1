"""The backend `kubernetes` against a small API server over HTTP, whose pods are processes. No real cluster."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import kube_api, process
from launcher.backends.base import STAGE_TAG
from launcher.cli import main
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState
from tests.fake_kubernetes import Cluster, server
from tests.ranks import LIMIT_S
from tests.recipes import write_recipe
from tests.waiting import until
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    folder = home / "kube"
    folder.mkdir()
    with server(folder) as (made, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        yield made


@pytest.fixture
def on(home: Path) -> Path:
    """Two pods of a process each; the code of this machine."""
    path = home / "kube.yaml"
    volumes = [{"claim": "runs", "path": str(home)}]
    kubernetes = {"nodes": 2, "cpus_per_node": 2, "requeues": 0, "volumes": volumes}
    tree = {
        "name": "kube",
        "backend": "kubernetes",
        "grace_s": 3,
        "container": {"image": "none", "workdir": str(ROOT)},
        "kubernetes": kubernetes,
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def layout(on: Path, home: Path) -> Iterator[RunLayout]:
    recipe = write_recipe(home / "r.yaml", resources__processes=2)
    made = create(make_plan(str(recipe), str(on), run=home / "with $HOME $(POD_IP)/mine", stages="generate,pack"))
    yield made
    process.end_tagged(STAGE_TAG, str(made.root), grace_s=0)


def start(layout: RunLayout, *acts: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.fake_stages.supervisor", str(layout.root), *acts]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def begun(layout: RunLayout) -> None:
    until(lambda: len(list(layout.stage("generate").glob("on-*"))) == 2, layout)


def agent_log(layout: RunLayout) -> str:
    return (layout.attempt("generate", 1) / "agent.log").read_text()


def test_a_chain_ends_done(cluster: Cluster, layout: RunLayout) -> None:
    """A stage after the other: an object each, made when the one before is done."""
    assert start(layout, "generate=pods:done", "pack=pods:done").wait(LIMIT_S) == 0, agent_log(layout)
    assert [stage.state for stage in RunState.read(layout).stages.values()] == ["done", "done"]
    assert read_json(layout.done("generate"))["pods"] == 2, "its paths hold what a kubelet would expand"
    made = [line for line in cluster.asked if line.startswith("POST")]
    assert made == ["POST /apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets"] * 2
    log = agent_log(layout)
    assert "node-0-1: Running" in log
    assert "node-0-0: holds the store: 1" in log
    assert "node-0-1: holds the store: 0" in log


def test_a_train_job_runs_as_well(cluster: Cluster, on: Path, home: Path) -> None:
    tree = yaml.safe_load(on.read_text())
    tree["kubernetes"]["kind"] = "TrainJob"
    on.write_text(yaml.safe_dump(tree))
    recipe = write_recipe(home / "r.yaml", resources__processes=2)
    layout = create(make_plan(str(recipe), str(on), run=home / "mine", stages="generate"))
    assert start(layout, "generate=pods:done").wait(LIMIT_S) == 0, agent_log(layout)
    assert "POST /apis/trainer.kubeflow.org/v1alpha1/namespaces/default/trainjobs" in cluster.asked
    assert "node-0-1: holds the store: 0" in agent_log(layout)


@pytest.mark.fault
def test_cancel_deletes_the_object_and_waits_for_its_pods(cluster: Cluster, layout: RunLayout) -> None:
    supervisor = start(layout, "generate=pods:wait")
    begun(layout)
    (pods,) = cluster.pods.values()
    assert main(["cancel", "mine"]) == 0
    assert all(pod.process.poll() is not None for pod in pods)
    assert supervisor.wait(LIMIT_S) == 1
    assert cluster.objects == {}
    assert RunState.read(layout).stages["generate"].state == "cancelled"


@pytest.mark.fault
def test_a_preemption_lets_the_pods_save(cluster: Cluster, layout: RunLayout) -> None:
    supervisor = start(layout, "generate=pods:wait")
    begun(layout)
    supervisor.send_signal(signal.SIGUSR2)
    assert supervisor.wait(LIMIT_S) == 1
    entry = RunState.read(layout).stages["generate"]
    assert (entry.state, entry.message) == ("preempted", "preempted, saved at step 3")
    assert cluster.objects == {}


@pytest.mark.fault
def test_a_lost_pod_fails_the_stage_with_its_last_words(cluster: Cluster, layout: RunLayout) -> None:
    supervisor = start(layout, "generate=pods:stay")
    begun(layout)
    (pods,) = cluster.pods.values()
    pods[1].process.kill()
    assert supervisor.wait(LIMIT_S) == 1
    entry = RunState.read(layout).stages["generate"]
    assert entry.state == "failed"
    assert "AJobEnded" in entry.message
    assert "node-0-1: holds the store: 0" in agent_log(layout)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("act", "number", "told"),
    [
        ("wait", signal.SIGTERM, "preempted, saved at step 3; tried again (1 of 5)"),
        ("stay", signal.SIGKILL, "node: machine-1 has lost its pod; "),
    ],
)
def test_a_stage_goes_on_after_an_eviction(
    cluster: Cluster, on: Path, home: Path, act: str, number: int, told: str
) -> None:
    """Whether it could save or not; where it could not, the node is avoided."""
    tree = yaml.safe_load(on.read_text())
    tree["kubernetes"] |= {"requeues": 5, "pause_s": 0}
    on.write_text(yaml.safe_dump(tree))
    recipe = write_recipe(home / "r.yaml", resources__processes=2)
    layout = create(make_plan(str(recipe), str(on), run=home / "mine", stages="generate"))
    supervisor = start(layout, f"generate=pods:{act}")
    begun(layout)
    (pods,) = cluster.pods.values()
    cluster.evict(pods[1], number)
    until(lambda: RunState.read(layout).stages["generate"].attempt == 2, layout)
    for path in layout.stage("generate").glob("on-*"):
        path.with_name(path.name.replace("on-", "go-")).touch()
    assert supervisor.wait(LIMIT_S) == 0, agent_log(layout)
    entry = RunState.read(layout).stages["generate"]
    assert entry.state == "done"
    assert entry.past[0].message.startswith(told)
    affinity = "avoids" if b"NotIn" in layout.manifest("generate").read_bytes() else "as before"
    assert affinity == ("as before" if act == "wait" else "avoids")


@pytest.mark.fault
def test_what_a_dead_supervisor_left_is_ended_by_the_next(cluster: Cluster, layout: RunLayout) -> None:
    """As after a power cut: neither the supervisor nor who watched the object could delete it."""
    supervisor = start(layout, "generate=pods:wait")
    begun(layout)
    ours = [pid for pid in process.tagged(STAGE_TAG, str(layout.root)) if b"launcher.kube" in command(pid)]
    for pid in (*ours, supervisor.pid):
        os.kill(pid, signal.SIGKILL)
    supervisor.wait(LIMIT_S)
    (left,) = cluster.objects
    assert start(layout, "generate=pods:done").wait(LIMIT_S) == 0
    assert left not in cluster.objects
    assert f"DELETE /apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets/{left}" in cluster.asked


def test_a_cluster_that_does_not_answer_is_waited_for(cluster: Cluster, layout: RunLayout) -> None:
    supervisor = start(layout, "generate=pods:wait")
    begun(layout)
    cluster.faults += [503, 500, 429]
    until(lambda: not cluster.faults, layout)
    assert supervisor.poll() is None
    for path in layout.stage("generate").glob("on-*"):
        path.with_name(path.name.replace("on-", "go-")).touch()
    assert supervisor.wait(LIMIT_S) == 0, agent_log(layout)


@pytest.mark.fault
def test_an_outage_while_the_object_is_made_is_waited_for(cluster: Cluster, layout: RunLayout) -> None:
    """Leftovers are looked for, and the object is made, as patiently as it is watched; made twice it is once."""
    cluster.faults += [429, 503]
    cluster.unheard = 1
    assert start(layout, "generate=pods:done").wait(LIMIT_S) == 0, agent_log(layout)
    assert [line.partition(" ")[0] for line in cluster.asked[:6]] == ["GET", "GET", "GET", "POST", "POST", "GET"]
    assert RunState.read(layout).stages["generate"].attempt == 1


@pytest.mark.fault
def test_an_object_that_was_there_before_is_not_taken_for_ours(cluster: Cluster) -> None:
    manifest = {"kind": "JobSet", "metadata": {"name": "a"}}
    cluster.objects["a"], cluster.pods["a"] = manifest, []
    asked = kube_api.Cluster(None, "default", "JobSet")
    with pytest.raises(UserError, match="409: already exists"):
        asked.create(manifest)
    asked.create(manifest, again=True)


def test_a_refusal_is_told_in_the_servers_words(cluster: Cluster, layout: RunLayout) -> None:
    cluster.refuse = "exceeded quota: gpus"
    assert start(layout, "generate=pods:done").wait(LIMIT_S) == 1
    assert "403: exceeded quota: gpus" in RunState.read(layout).stages["generate"].message


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def submit(home: Path, on: Path, where: Path) -> int:
    recipe = write_recipe(home / "r.yaml", resources__processes=2)
    return main(["submit", str(recipe), "--on", str(on), "--run", str(where), "--stages", "generate"])


def test_nothing_is_made_without_the_client(
    on: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def lacking(name: str, *others: Any) -> Any:
        if name.partition(".")[0] in ("kubernetes", "kubeflow_trainer_api"):
            raise ImportError(name)
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", lacking)
    assert submit(home, on, home / "mine") == 2
    told = capsys.readouterr().err
    assert told == "error: Kubernetes: its client is not installed; pip install -c constraints.txt -e '.[kubernetes]'\n"
    assert not (home / "mine").exists()
    assert main(["plan", str(home / "r.yaml"), "--on", str(on)]) == 0, "it needs no client"


@pytest.mark.parametrize("config", ["nowhere", "broken"])
def test_no_cluster_is_no_localhost(
    on: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    (home / "broken").write_text("apiVersion: v1\nkind: Config\n")
    monkeypatch.setenv("KUBECONFIG", str(home / config))
    assert submit(home, on, home / "mine") == 2
    told = capsys.readouterr().err
    assert "nothing says where the cluster is" in told
    assert len(told.splitlines()) == 1
    assert not (home / "mine").exists()


def test_a_run_that_pods_do_not_see_is_refused(
    cluster: Cluster, on: Path, home: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine"
    assert submit(home, on, elsewhere) == 2
    assert (
        f"lies on no volume that the pods mount; choose --run, or VQSCALE_RUNS, below {home}" in capsys.readouterr().err
    )
    assert not elsewhere.exists()
    assert cluster.asked == []


def test_submit_goes_through_the_commands(cluster: Cluster, on: Path, home: Path) -> None:
    cluster.refuse = "not today"
    assert submit(home, on, home / "mine") == 0
    layout = RunLayout(home / "mine")
    until(lambda: RunState.read(layout).stages["generate"].state == "failed", layout)
    assert "not today" in RunState.read(layout).stages["generate"].message
    assert layout.manifest("generate").exists()
