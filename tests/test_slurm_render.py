"""What is sent to Slurm: golden text, hostile values, profiles. Needs no Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.profile import Profile
from cluster.slurm import OURS, SlurmSettings
from launcher.backends.base import Job, Place
from launcher.backends.slurm import SlurmBackend
from launcher.cli import main
from launcher.plan import load_profile, make_plan
from tests.recipes import tiny_recipe, write_recipe
from vqscale.errors import UserError

GOLDEN = """\
#!/usr/bin/env bash
#SBATCH --job-name=vqscale-tiny-1-tokenizer
#SBATCH --partition=gpu
#SBATCH --account=me
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=2
#SBATCH --mem=64G
#SBATCH --time=60
#SBATCH --exclude=bad1,gpu[03-04]
#SBATCH --signal=B:USR2@120
#SBATCH --open-mode=append
#SBATCH --output=supervisor.log
#SBATCH --requeue
#SBATCH --constraint=a100
set -e -o pipefail
trap '' USR1 USR2  # until launcher.batch listens

module load cuda/12.8
export OMP_NUM_THREADS=4  # 8 cores / 2 processes
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # cluster.rendezvous
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=30  # cluster.rendezvous (grace_s of the profile)
export NCCL_DEBUG=WARN  # profile here
export VQSCALE_GRACE_S=30  # profile here
export VQSCALE_STAGE_OF='/runs/with space/tiny-1'  # launcher
cd /src

read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
endpoint="${address:?Slurm knows no address of $first}:$((20000 + SLURM_JOB_ID % 10000))"

exec /venv/bin/python -m launcher.batch --run '/runs/with space/tiny-1' --stage tokenizer \\
    --requeues 5 --retries 3 --pause 30 \\
    --grace 30 -- \\
    srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=8 \\
    --kill-on-bad-exit=0 --wait=30 --label \\
    bash -c 'PET_RDZV_CONF="is_host=$((SLURM_NODEID == 0))" exec "$@"' agent \\
    /venv/bin/python -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --max-restarts 0 \\
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \\
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 \\
    --redirects 3 -m -- pipelines.train_tokenizer --run '/runs/with space/tiny-1'
"""

NASTY = (
    "; rm -rf .",
    "$(touch canary)",
    "`touch canary`",
    "'; touch canary; '",
    '"; touch canary; "',
    "a\nb",
    "x\n#SBATCH --nodes=99\ny",
    "--run",
    "-",
    "\\",
    "%j",
    "*",
    "~",
    "&& touch canary",
    "ünï✓\u202e\U0001f600",
    " ",
    "\t\r\x1b[31m",
    "{generate}",
)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


def golden_job(run: str = "/runs/with space/tiny-1", **changes: Any) -> Job:
    recipe = tiny_recipe(resources={"processes": 4, "device": "cpu"}, data__streams=4)
    slurm = SlurmSettings(
        partition="gpu",
        account="me",
        gpus_per_node=2,
        cpus_per_task=8,
        memory_gb=64,
        time_min=60,
        exclude=("bad1", "gpu[03-04]"),
        options=("--constraint=a100",),
        setup=("module load cuda/12.8",),
        requeues=5,
    )
    profile = Profile(name="here", backend="slurm", environment={"NCCL_DEBUG": "WARN"}, slurm=slurm)
    profile = profile.model_copy(update=changes)
    places = dict.fromkeys(("pack", "tokenizer"), Place(8, 2))
    return Job(recipe, profile, Path(run), ("pack", "tokenizer"), "/venv/bin/python", Path("/src"), places)


def test_the_script_is_golden() -> None:
    first, second = SlurmBackend().render(golden_job())
    assert second.script == GOLDEN
    assert first.argv == ("sbatch", "--parsable", "/runs/with space/tiny-1/stages/pack/job.sh")
    assert second.argv[2:-1] == ("--dependency=afterok:{pack}", "--kill-on-invalid-dep=yes")
    assert second.directory == Path("/runs/with space/tiny-1"), "where --output=supervisor.log lies"


def test_render_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SlurmBackend().render(golden_job())
    for name in ("OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_CONF", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "99")
    monkeypatch.chdir("/")
    assert SlurmBackend().render(golden_job()) == before
    environment = before[0].environment()
    assert environment["SLURM_CONF"] == "99"
    assert "SBATCH_PARTITION" not in environment, "it would override the script"


@pytest.fixture(scope="module")
def bench() -> Iterator[Path]:
    """A folder with a fake scontrol, and a program that writes down how it was called."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = {
            "scontrol": "#!/bin/sh\n"
            'case "$2" in hostnames) echo node7; echo node8;; *) echo "NodeName=x NodeAddr=10.0.0.7 X=1";; esac\n',
            "dump": f"#!{sys.executable} -SE\nimport json, os, sys\n"
            "words = [os.fsencode(word).hex() for word in sys.argv[1:]]\n"
            "given = {k.hex(): v.hex() for k, v in os.environb.items()}\n"
            "json.dump([words, given], open(os.environb[b'DUMP'], 'w'))\n",
        }
        for command, text in commands.items():
            (folder / command).write_text(text)
            (folder / command).chmod(0o755)
        yield folder


def called(bench: Path, script: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the program that a batch script becomes."""
    dump = bench / "dump.json"
    dump.unlink(missing_ok=True)
    surroundings = {
        "PATH": f"{bench}:{os.environ['PATH']}",
        "DUMP": str(dump),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    done = subprocess.run(
        ["bash", "-c", script], env=surroundings, cwd=bench, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    words, given = json.loads(dump.read_text())
    unhex = lambda text: os.fsdecode(bytes.fromhex(text))  # noqa: E731
    return [unhex(word) for word in words], {unhex(k): unhex(v) for k, v in given.items()}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(value=TEXT | st.sampled_from(NASTY), run=TEXT | st.sampled_from(NASTY))
@example(value=NASTY[6], run=NASTY[6])
@example(value=NASTY[3], run=NASTY[4])
def test_no_value_is_read_as_shell(bench: Path, value: str, run: str) -> None:
    root = f"/runs/{run.replace('/', '_')}x"

    def rendered(where: str, value: str) -> str:
        job = golden_job(where, environment={"HOSTILE": value})
        slurm = job.profile.slurm
        assert slurm is not None
        profile = job.profile.model_copy(update={"slurm": slurm.model_copy(update={"setup": ()})})
        job = Job(job.recipe, profile, job.run, job.stages, str(bench / "dump"), bench, job.places)
        return SlurmBackend().render(job)[0].script

    script = rendered(root, value)
    words, environment = called(bench, script)
    plain, _ = called(bench, rendered("/runs/plain", "plain"))
    assert words == [root if word == "/runs/plain" else word for word in plain]
    assert environment["HOSTILE"] == value
    assert environment["VQSCALE_STAGE_OF"] == root
    assert sorted(path.name for path in bench.iterdir()) == ["dump", "dump.json", "scontrol"]
    head = script.partition("\nset -e")[0].splitlines()[1:]
    assert len(head) == 15
    assert all(line.startswith("#SBATCH --") and line.isascii() for line in head)


def test_the_first_node_is_where_all_meet(bench: Path) -> None:
    job = golden_job()
    job = Job(job.recipe, job.profile, job.run, job.stages, str(bench / "dump"), bench, job.places)
    script = SlurmBackend().render(job)[0].script.replace("module load cuda/12.8\n", "")
    words, _ = called(bench, script)
    assert words[words.index("--rdzv-endpoint") + 1] == "10.0.0.7:22345"
    assert words[words.index("--rdzv-id") + 1] == "12345-0"
    on_each = words[words.index("-c") + 1]
    for node, holds in (("0", "1"), ("1", "0")):
        command = ["bash", "-c", on_each, "agent", "printenv", "PET_RDZV_CONF"]
        printed = subprocess.run(command, env={**os.environ, "SLURM_NODEID": node}, capture_output=True, text=True)
        assert printed.stdout == f"is_host={holds}\n"


@given(option=TEXT | st.sampled_from(NASTY).map(lambda text: f"--comment={text}"))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_further_options_are_one_plain_word_or_refused(option: str) -> None:
    try:
        (kept,) = SlurmSettings(cpus_per_task=1, options=(option,)).options
    except ValidationError:
        return
    assert kept.isascii()
    assert kept.startswith("--")
    assert not set(kept) & set(" \t\n\r\"'\\#")


@pytest.mark.parametrize("option", [f"--{name}=1" for name in OURS] + ["--constraint=a b", "-C a100", "x", "--a='b'"])
def test_options_that_are_not_the_users_are_refused(option: str) -> None:
    with pytest.raises(ValidationError):
        SlurmSettings(cpus_per_task=1, options=(option,))


@pytest.mark.parametrize("change", [{"partition": "a b"}, {"account": "--x"}, {"qos": "a\nb"}, {"setup": ("a\nb",)}])
def test_names_of_slurm_are_plain(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SlurmSettings(cpus_per_task=1, **change)


def test_nodes_follow_from_processes() -> None:
    eight = SlurmSettings(cpus_per_task=1, gpus_per_node=8)
    assert [eight.spread(processes) for processes in (1, 8, 16, 64)] == [1, 1, 2, 8]
    assert SlurmSettings(cpus_per_task=1).spread(5) == 1
    assert SlurmSettings(cpus_per_task=1, nodes=3).spread(6) == 3
    for settings_, processes in ((eight, 9), (SlurmSettings(cpus_per_task=1, nodes=3), 4)):
        with pytest.raises(ValueError, match=f"{processes} processes cannot be shared evenly"):
            settings_.spread(processes)


def test_profiles_that_cannot_be_are_refused(tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    for text, expected in [
        ("backend: slurm\n", "go together"),
        ("slurm: {cpus_per_task: 1}\n", "go together"),
        ("backend: slurm\nslurm: {cpus_per_task: 1, lead_s: 30}\n", "lead_s must be more than 5 s above grace_s"),
        ("backend: slurm\nslurm: {cpus_per_task: 1, partitoin: a}\n", "did you mean"),
    ]:
        profile.write_text(f"name: mine\n{text}")
        with pytest.raises(UserError, match=expected):
            load_profile(str(profile))


def test_gpus_have_to_be_there(home: Path) -> None:
    profile = home / "two.yaml"
    profile.write_text("name: two\nbackend: slurm\nslurm: {cpus_per_task: 4, gpus_per_node: 2, nodes: 1}\n")
    recipe = write_recipe(home / "r.yaml", resources={"processes": 4}, data__streams=4)
    with pytest.raises(UserError, match="4 processes a node, but profile two has 2 GPUs a node"):
        make_plan(str(recipe), str(profile))
    assert make_plan(str(recipe), str(profile), ["resources.device=cpu"]).job.places["prior"].nodes == 1


@pytest.mark.parametrize("name", ["devslurm", "slurm-gpu"])
def test_plan_prints_what_is_sent(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(home / "r.yaml", resources={"processes": 2, "device": "cpu"})
    assert main(["plan", str(path), "--on", name, "--run", str(home / "mine")]) == 0
    printed = capsys.readouterr().out
    made = make_plan(str(path), name, run=home / "mine")
    for command in made.commands:
        assert "\n".join(f"    | {line}".rstrip() for line in command.script.splitlines()) in printed
        assert command.argv[-1] in printed
    assert not (home / "mine").exists()
