"""Hostile names and values through `render` of every backend: whatever they hold, words stay words.

What a real shell and a real kubelet make of them stands in the tests of the single backends.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.container import ContainerSettings
from launcher.backends.base import Job, StageCommand
from launcher.backends.kubernetes import KubernetesBackend
from launcher.backends.local import LocalBackend
from launcher.backends.slurm import SlurmBackend
from launcher.backends.ssh import SshBackend
from tests import test_kubernetes_render, test_launcher_plan, test_slurm_render, test_ssh_render
from tests.test_slurm_render import NASTY, TEXT

Render = Callable[[Job], StageCommand]


def _last(backend: LocalBackend | SlurmBackend | SshBackend | KubernetesBackend) -> Render:
    return lambda job: backend.render(job)[-1]


def _in_apptainer(job: Job) -> StageCommand:
    container = ContainerSettings(runtime="apptainer", image="a.sif")
    profile = job.profile.model_copy(update={"container": container})
    return SlurmBackend().render(Job(job.recipe, profile, job.run, job.stages, job.python, job.source, job.places))[-1]


BACKENDS: dict[str, tuple[Callable[[], Job], Render, Callable[[str], list[str]]]] = {
    "local": (test_launcher_plan.golden_job, _last(LocalBackend()), lambda script: []),
    "slurm": (test_slurm_render.golden_job, _last(SlurmBackend()), lambda script: shlex.split(script, comments=True)),
    "containers": (test_slurm_render.golden_job, _in_apptainer, lambda script: shlex.split(script, comments=True)),
    "ssh": (test_ssh_render.golden_job, _last(SshBackend()), lambda script: _of_hosts(json.loads(script))),
    "kubernetes": (
        test_kubernetes_render.golden_job,
        _last(KubernetesBackend()),
        lambda script: _leaves(yaml.safe_load(script)),
    ),
}
"""Backend → a job, its last command, and the words in what is handed over besides."""


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(value=TEXT | st.sampled_from(NASTY), run=TEXT | st.sampled_from(NASTY))
@example(value="x\n#SBATCH --nodes=99\n", run="--run")
@example(value="$(POD_IP) $$ `x`", run="; rm -rf .")
def test_words_stay_words(backend: str, value: str, run: str) -> None:
    make, render, words_of = BACKENDS[backend]
    folder = run.replace("/", "_")
    if backend == "containers":  # these part mounts, and are refused
        folder = re.sub("[,:\n]", "_", folder)

    def rendered(root: str, text: str) -> StageCommand:
        job = make()
        profile = job.profile.model_copy(update={"environment": {"HOSTILE": text}})
        if profile.slurm:
            profile = profile.model_copy(update={"slurm": profile.slurm.model_copy(update={"setup": ()})})
        return render(Job(job.recipe, profile, Path(root), job.stages, job.python, job.source, job.places))

    hostile, plain = rendered(f"/runs/{folder}x", value), rendered("/runs/plain", "plain")
    assert shlex.split(hostile.shell().replace(" \\\n    ", " ")) == list(hostile.argv), "as plan prints it"
    assert len(hostile.argv) == len(plain.argv)
    assert {variable.name: variable.value for variable in hostile.variables}["HOSTILE"] == value
    there, expected = words_of(hostile.script), words_of(plain.script)
    assert len(there) == len(expected), "no word more, none less"


def _of_hosts(tree: dict[str, object]) -> list[str]:
    hosts = tree["hosts"]
    assert isinstance(hosts, list)
    return [word for host in hosts for name in ("ssh", "runs") for word in shlex.split(host[name])] + _leaves(
        {name: one for name, one in tree.items() if name != "hosts"}
    )


def _leaves(tree: object) -> list[str]:
    if isinstance(tree, dict):
        return [leaf for one in tree.values() for leaf in _leaves(one)]
    if isinstance(tree, list):
        return [leaf for one in tree for leaf in _leaves(one)]
    return [str(tree)]
