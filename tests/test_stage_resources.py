"""Resources of single stages: who reads them, what is checked, and what is asked of Slurm for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.backends.base import StageCommand
from launcher.cli import main
from launcher.plan import make_plan
from tests.recipes import tiny_recipe, write_recipe
from vqscale.errors import UserError

COMMON = {"processes": 2, "threads": 1, "device": "cpu", "hang_s": 50}


def test_what_a_stage_does_not_set_is_as_for_all() -> None:
    own = {"prior": {"processes": 1, "threads": 3, "strategy": "fsdp2"}, "extract": {"array": 4, "timeout_s": 9}}
    resources = tiny_recipe(resources={**COMMON, "stages": own}).resources
    prior, extract = resources.of("prior"), resources.of("extract")
    assert (prior.processes, prior.threads, prior.strategy, prior.hang_s) == (1, 3, "fsdp2", 50)
    assert (extract.processes, extract.timeout_s, extract.strategy) == (2, 9, "ddp")
    assert resources.of("tokenizer") == resources
    assert [resources.array_of(stage) for stage in ("tokenizer", "extract", "sample")] == [1, 4, 1]


def test_zero_threads_of_a_stage_are_no_omission() -> None:
    resources = tiny_recipe(resources={**COMMON, "stages": {"pack": {"threads": 0}}}).resources
    assert (resources.threads, resources.of("pack").threads) == (1, 0)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"prior": {"processes": 3}}, "data.streams 2 is not divisible by resources.stages.prior.processes 3"),
        ({"extract": {"processes": 3}}, None),  # it reads shards, not streams
        (
            {"extrct": {"processes": 3}},
            "unknown key 'resources.stages.extrct'; did you mean 'resources.stages.extract'",
        ),
        ({"prior": {"array": 2}}, "unknown key 'resources.stages.prior.array'"),
        ({"extract": {"array": 0}}, "'resources.stages.extract.array' is 0"),
        ({"prior": {"checkpoints": "x"}}, "unknown key 'resources.stages.prior.checkpoints'"),
    ],
)
def test_limits_are_those_of_the_stage(stages: dict[str, Any], expected: str | None) -> None:
    resources = {**COMMON, "processes": 1, "stages": stages}
    if expected is None:
        tiny_recipe(resources=resources)
    else:
        with pytest.raises(UserError) as caught:
            tiny_recipe(resources=resources)
        assert expected in str(caught.value)


def test_a_batch_has_to_fit_the_stages_own_ranks() -> None:
    """Four ranks are too many for the common batch; the prior alone has them and a batch that fits."""
    fits: dict[str, Any] = {"data__streams": 4, "prior__training__global_batch": 16}
    tiny_recipe(resources={**COMMON, "stages": {"prior": {"processes": 4}}}, **fits)
    with pytest.raises(UserError, match=r"global_batch 12 is not divisible by resources.stages.prior.processes 4"):
        tiny_recipe(
            resources={**COMMON, "stages": {"prior": {"processes": 4}}}, **{**fits, "prior__training__global_batch": 12}
        )


def test_a_strategy_of_one_stage_is_checked_for_it_alone() -> None:
    muon: dict[str, Any] = {"optimizer": "muon", "steps": 8, "global_batch": 8, "learning_rate": 1e-3}
    own = {"tokenizer": {"strategy": "fsdp2"}}
    tiny_recipe(resources={**COMMON, "stages": own}, prior__training=muon)
    with pytest.raises(UserError, match=r"which resources.stages.prior.strategy zero1 cuts"):
        tiny_recipe(resources={**COMMON, "stages": {"prior": {"strategy": "zero1"}}}, prior__training=muon)


def words(command: StageCommand) -> dict[str, str]:
    return dict(zip(command.argv, command.argv[1:], strict=False))


def test_commands_and_plan_show_them(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"extract": {"processes": 4, "threads": 2}, "prior": {"max_restarts": 3}}
    path = str(write_recipe(home / "r.yaml", resources={**COMMON, "stages": own}))
    by_stage = {command.stage: command for command in make_plan(path).commands}
    assert [words(by_stage[name])["--nproc-per-node"] for name in ("tokenizer", "extract")] == ["2", "4"]
    assert [words(by_stage[name])["--max-restarts"] for name in ("tokenizer", "prior")] == ["0", "3"]
    assert by_stage["extract"].environment({})["OMP_NUM_THREADS"] == "2"
    assert main(["plan", path]) == 0
    text = capsys.readouterr().out
    assert "extract    processes: 4 on 1 node" in text
    assert text.count("OMP_NUM_THREADS ") == 7, "it is no longer the same for every stage"
    assert main(["plan", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["resources"]
    assert (facts["extract"]["processes"], facts["tokenizer"]["processes"]) == (4, 2)


def test_a_profile_asks_for_less_where_less_is_needed(home: Path) -> None:
    slurm = {
        "cpus_per_task": 8,
        "gpus_per_node": 2,
        "partition": "gpu",
        "time_min": 60,
        "stages": {
            "pack": {"partition": "cpu", "gpus_per_node": 0, "cpus_per_task": 32, "time_min": 5, "memory_gb": 9}
        },
    }
    (home / "p.yaml").write_text(yaml.safe_dump({"name": "p", "backend": "slurm", "slurm": slurm}))
    made = make_plan(str(write_recipe(home / "r.yaml", resources=COMMON)), str(home / "p.yaml"))
    scripts = {command.stage: command.script for command in made.commands}
    for line in ("partition=cpu", "time=5", "mem=9G", "cpus-per-task=32"):
        assert f"#SBATCH --{line}\n" in scripts["pack"]
    assert "gpus" not in scripts["pack"]
    for line in ("partition=gpu", "time=60", "gpus-per-node=2", "cpus-per-task=8"):
        assert f"#SBATCH --{line}\n" in scripts["tokenizer"]
    assert "OMP_NUM_THREADS=1" in scripts["pack"]


def test_a_profile_that_names_no_stage_is_refused(home: Path) -> None:
    slurm = {"cpus_per_task": 1, "stages": {"extrac": {"partition": "cpu"}}}
    (home / "p.yaml").write_text(yaml.safe_dump({"name": "p", "backend": "slurm", "slurm": slurm}))
    with pytest.raises(UserError, match=r"slurm.stages of profile p: no stage 'extrac'; did you mean 'extract'"):
        make_plan(str(write_recipe(home / "r.yaml", resources=COMMON)), str(home / "p.yaml"))
