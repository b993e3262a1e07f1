"""The doctor in pods and in containers: a small API server whose pods are processes, and stand-ins for programs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.preflight.host import look_at_host
from cluster.preflight.judge import judge_equal
from cluster.preflight.node import ENDPOINT, INDEX
from cluster.profile import Profile
from cluster.rendezvous import NODE
from launcher.backends.everywhere import Errand, run_everywhere
from launcher.cli import main
from tests import fake_kubernetes
from tests.test_doctor import report

ROOT = Path(__file__).resolve().parents[1]


def in_pods(home: Path, kind: str) -> str:
    """A profile of two pods, which are processes of this machine."""
    path = home / "kube.yaml"
    kubernetes = {"kind": kind, "cpus_per_node": 2, "volumes": [{"claim": "runs", "path": str(home)}]}
    container = {"image": "registry/vqscale:1", "workdir": str(ROOT)}
    head = {"name": "kube", "backend": "kubernetes", "environment": {"GLOO_SOCKET_IFNAME": "lo"}, "grace_s": 3}
    path.write_text(yaml.safe_dump({**head, "container": container, "kubernetes": kubernetes}))
    return str(path)


@pytest.mark.dist
def test_pods_are_asked(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a stage is started, by a TrainJob, whose pods are told an address; nothing is left in the cluster."""
    (home / "kube").mkdir()
    with fake_kubernetes.server(home / "kube") as (cluster, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        main(["doctor", "--on", in_pods(home, "TrainJob"), "--json"])
        assert cluster.objects == {}
    printed = capsys.readouterr()
    found = {(one["where"], one["check"]): one for one in json.loads(printed.out)}
    assert "asks 2 nodes of kube, inside registry/vqscale:1" in printed.err
    assert found["here", "Kubernetes"]["value"] == "answers, and knows TrainJob in namespace default"
    assert found["all nodes", "nodes"]["value"] == "2 of 2 answered", printed.out
    assert found["all nodes", "rendezvous"]["value"].startswith("2 ranks over gloo"), printed.out
    assert found["all nodes", "shared folder"]["word"] == "ok", printed.out
    assert found["all nodes", "equal versions"]["word"] == "ok", printed.out
    assert found["machine-1-1", "clock offset"]["word"] == "n/a"


def test_a_cluster_that_refuses(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "kube").mkdir()
    with fake_kubernetes.server(home / "kube") as (cluster, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        cluster.faults += [403]
        assert main(["doctor", "--on", in_pods(home, "JobSet")]) == 1
        told = " ".join(capsys.readouterr().out.split())
        assert "FAIL here Kubernetes 403:" in told
        assert "mend: install JobSet in the cluster, or see kubectl auth can-i create JobSet -n default" in told
        cluster.faults += [503]
        assert main(["doctor", "--on", in_pods(home, "JobSet")]) == 1
        assert "does not answer (503" in capsys.readouterr().out
        assert not [line for line in cluster.asked if line.startswith("POST")]
    assert main(["doctor", "--on", "kubernetes-gpu"]) == 2
    error = capsys.readouterr().err
    assert "lies on no volume that the pods mount; choose --run, or VQSCALE_RUNS, below /runs" in error


def test_an_image_is_compared_with_itself_and_its_code_with_ours() -> None:
    here = look_at_host()
    there = replace(here, packages={**here.packages, "torch": "9.9"})
    same = judge_equal([report("a", host=there), report("b", host=there)], here, inside=True)
    assert (same.word, same.value) == ("ok", f"{len(here.packages)} packages on all nodes, the code as here")
    differ = judge_equal([report("a", host=there), report("b", host=here)], here, inside=True)
    assert differ.word == "FAIL"
    assert "on b, 9.9 on a" in differ.value
    old = judge_equal([report("a", host=replace(there, code="0" * 64))], here, inside=True)
    assert old.value == f"vqscale's code 00000000 on a, {here.code[:8]} here"
    assert old.mend == "make the image anew from this code"


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_nodes_of_slurm_are_asked_inside_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """Against stand-ins for Slurm's and Apptainer's programs, which keep their arguments and start what is named."""
    job = "SLURM_JOB_ID=12345 SLURM_JOB_NODELIST='n[0-1]'"
    keep = 'printf "%s\\n" "$@" > "$0.asked"; '
    skip = 'while [ "$1" != bash ]; do shift; done; '
    programs = {
        "salloc": f'{keep}{skip}exec env {job} "$@"',
        "srun": f'{keep}{skip}exec env {job} SLURMD_NODENAME=n1 SLURM_NODEID=1 "$@"',
        "scontrol": 'case "$2" in hostnames) echo n0; echo n1;; node) echo "   NodeAddr=10.0.0.1 Port=1";; esac',
        "apptainer": f'{keep}while [ "$1" != a.sif ]; do shift; done; shift; exec "$@"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    names = [NODE, INDEX, ENDPOINT]
    (tmp_path / "told.py").write_text(f"import os, sys\nprint(*(os.environ[n] for n in {names}), sys.argv[1:])")
    head = {"name": "x", "backend": "slurm", "slurm": {"cpus_per_task": 4, "gpus_per_node": 1}}
    container = {"runtime": runtime, "image": "a.sif", "python": sys.executable, "mounts": ["/data:/data"]}
    profile = Profile.model_validate({**head, "container": container, "environment": {"PYTHONPATH": str(tmp_path)}})
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (line,) = run_everywhere(Errand(profile, "told", ("it's", "$HOME"), tmp_path, nodes=2, wait_s=9, limit_s=100))
    assert line == "n1 1 10.0.0.1:22345 [\"it's\", '$HOME']\n"
    mounts = f"/data:/data,{tmp_path}:{tmp_path},{ROOT}:{ROOT}"
    if runtime == "pyxis":
        assert {"--nodes=2", "--immediate=9"} <= set((tmp_path / "salloc.asked").read_text().splitlines())
        step = (tmp_path / "srun.asked").read_text().splitlines()
        assert {"--container-image=a.sif", f"--container-mounts={mounts}", "--kill-on-bad-exit=0"} <= set(step)
        assert any(word.startswith("--container-env=") and word.endswith(ENDPOINT) for word in step)
    else:
        words = (tmp_path / "apptainer.asked").read_text().splitlines()
        assert words[:6] == ["exec", "--nv", "--bind", mounts, "--pwd", str(ROOT)]
        assert not (tmp_path / "salloc.asked").exists()
