"""Containers: what Slurm's nodes are told, word by word; and the files that make the image, which is not built here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.container import ContainerSettings
from launcher.backends.base import Job
from launcher.backends.slurm import SlurmBackend
from tests.test_slurm_render import golden_job
from vqscale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "cluster/containers"

PYXIS = """\
    --kill-on-bad-exit=0 --wait=30 --label \\
    '--container-image=nvcr.io#nvidia/pytorch:26.10' \\
'--container-mounts=/data:/data:ro,/runs/with space/tiny-1:/runs/with space/tiny-1,/src:/src' \\
--container-workdir=/src \\
--container-env=OMP_NUM_THREADS,TORCH_DISABLE_SHARE_RDZV_TCP_STORE,TORCH_ELASTIC_SHUTDOWN_TIMEOUT,\
NCCL_DEBUG,VQSCALE_GRACE_S,VQSCALE_STAGE_OF \\
    bash -c 'PET_RDZV_CONF="is_host=$((SLURM_NODEID == 0))" exec "$@"' agent \\
    /venv/bin/python -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --max-restarts 0 \\
"""
APPTAINER = """\
    --kill-on-bad-exit=0 --wait=30 --label \\
    bash -c 'PET_RDZV_CONF="is_host=$((SLURM_NODEID == 0))" exec "$@"' agent \\
    apptainer exec --nv --bind '/data:/data:ro,/runs/with space/tiny-1:/runs/with space/tiny-1' \\
--pwd /opt/vqscale /images/vqscale.sif \\
    /opt/venv/bin/python -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --max-restarts 0 \\
"""


def job(run: str = "/runs/with space/tiny-1", **container: Any) -> Job:
    return golden_job(run, container=ContainerSettings(mounts=("/data:/data:ro",), **container))


def script(made: Job) -> str:
    return SlurmBackend().render(made)[1].script


def flat(text: str) -> str:
    """Lines that go on, as one: only words and their quoting count."""
    return re.sub(r" *\\\n *", " ", text)


def test_pyxis_is_told_image_and_mounts() -> None:
    made = script(job(runtime="pyxis", image="nvcr.io#nvidia/pytorch:26.10"))
    assert flat(PYXIS).strip() in flat(made)


def test_apptainer_stands_before_the_agent() -> None:
    inside = {"workdir": "/opt/vqscale", "python": "/opt/venv/bin/python"}
    made = script(job(runtime="apptainer", image="/images/vqscale.sif", **inside))
    assert flat(APPTAINER).strip() in flat(made)


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_what_requeues_stays_on_the_host(runtime: str) -> None:
    """There is no `scontrol` in the image; and `srun` starts the container, not the other way round."""
    made = script(job(runtime=runtime, image="/images/vqscale.sif", python="/opt/venv/bin/python"))
    host, _, node = flat(made).partition(" srun ")
    assert host.splitlines()[-1].startswith("exec /venv/bin/python -m launcher.batch ")
    assert "container" not in host
    assert "apptainer" not in host
    assert "/venv/bin/python -m torch" not in node.replace("/opt/venv/bin/python", "")


def test_without_a_container_nothing_changes() -> None:
    assert "apptainer" not in script(golden_job())
    assert "container" not in script(golden_job())


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@pytest.mark.parametrize("run", ["/runs/$(touch canary)", "/runs/'; touch canary; '", "/runs/`x` && y", '/runs/ü "q"'])
def test_no_value_is_read_as_shell(runtime: str, run: str, tmp_path: Path) -> None:
    """The line as a shell runs it, with a program in srun's place that tells how it was called."""
    made = script(job(run, runtime=runtime, image="a.sif"))
    show = tmp_path / "srun"
    show.write_text(f"#!{sys.executable} -SE\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    show.chmod(0o755)
    line = "srun " + flat(made).partition(" srun ")[2]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "endpoint": "e", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", "-c", line], env=environment, cwd=tmp_path, capture_output=True, check=True)
    words = json.loads(done.stdout)
    mounts = f"/data:/data:ro,{run}:{run},/src:/src"
    assert (f"--container-mounts={mounts}" if runtime == "pyxis" else mounts) in words
    assert words[-1] == run
    assert not (tmp_path / "canary").exists()


def test_a_run_that_cannot_be_mounted_is_refused() -> None:
    with pytest.raises(UserError, match="without commas and colons"):
        script(job("/runs/a:b", runtime="pyxis", image="a.sif"))


@pytest.mark.parametrize(
    "change",
    [
        {"image": "a b"},
        {"image": "--privileged"},
        {"image": "$(x)"},
        {"image": "docker://x", "runtime": "pyxis"},
        {"mounts": ("data:/data",)},
        {"mounts": ("/data",)},
        {"mounts": ("/a:/b,/c:/d",)},
        {"mounts": ("/a:/b:rw,z",)},
        {"workdir": "src"},
        {"python": "python"},
        {"runtime": "docker"},
    ],
)
def test_what_could_mean_something_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ContainerSettings(**{"image": "a.sif", **change})


def dockerfile() -> list[list[str]]:
    """Instructions as words; lines that go on are joined."""
    text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
    return [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]


def project() -> dict[str, Any]:
    made: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return made


def installed_extras() -> set[str]:
    """Extras that the one `pip install` with constraints asks for."""
    parts = [part.strip() for word, rest in dockerfile() if word == "RUN" for part in rest.split("&&")]
    (install,) = [words for part in parts if (words := shlex.split(part))[:2] == ["pip", "install"] and "-c" in words]
    assert install[install.index("-c") + 1] == "constraints.txt"
    extras = re.fullmatch(r"\.\[([\w,]+)\]", install[-1])
    assert extras
    return set(extras[1].split(","))


def test_the_image_has_what_the_project_asks_for() -> None:
    asked = project()
    assert installed_extras() <= set(asked["project"]["optional-dependencies"])
    copies = [rest.split() for word, rest in dockerfile() if word == "COPY" and "--from" not in rest]
    copied = {source for words in copies for source in words[:-1]}
    packages = {pattern.rstrip("*") for pattern in asked["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "constraints.txt", asked["project"]["readme"]} <= copied
    assert all((ROOT / path).exists() for path in copied)
    floor = asked["project"]["requires-python"].removeprefix(">=")
    (version,) = [rest.partition("=")[2] for word, rest in dockerfile() if word == "ARG"]
    assert [int(part) for part in version.split(".")] >= [int(part) for part in floor.split(".")]


def test_all_that_the_image_installs_is_pinned() -> None:
    def name(line: str) -> str:
        return re.split(r"[\[>=;<~ ]", line)[0].lower().replace("_", "-")

    asked = project()["project"]
    extras = [one for extra in installed_extras() for one in asked["optional-dependencies"][extra]]
    pinned = {name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name(one) for one in [*asked["dependencies"], *extras]} <= pinned


def test_the_last_stage_has_no_tools_for_building() -> None:
    stages = [rest for word, rest in dockerfile() if word == "FROM"]
    assert len(stages) == 2
    words = [word for word, _ in dockerfile()]
    last = dockerfile()[len(words) - words[::-1].index("FROM") :]
    assert [rest.split()[0] for word, rest in last if word == "COPY"] == ["--from=build", "--from=build"]
    assert not [rest for word, rest in last if word == "RUN" and "pip" in rest]


def test_apptainers_image_is_made_from_that() -> None:
    definition = (FOLDER / "vqscale.def").read_text()
    tag = re.search(r"docker build .* -t (\S+) ", (FOLDER / "Dockerfile").read_text())
    assert tag
    assert f"From: {tag[1]}\n" in definition
    assert "Bootstrap: docker-daemon\n" in definition
    asked = project()["project"]
    assert tag[1] == f"{asked['name']}:{asked['version']}"
