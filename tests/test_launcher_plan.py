"""The plan: golden text of what is started, checks before anything is, machines and profiles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.profile import Profile, profile_path
from cluster.rendezvous import agent_arguments, inherited, thread_environment
from launcher import plan as plan_module
from launcher import precision
from launcher.backends.base import Job, Place
from launcher.backends.local import LocalBackend
from launcher.cli import main
from launcher.plan import absolute_paths, load_profile, make_plan, select_stages
from tests.recipes import tiny_recipe, write_recipe
from vqscale.errors import UserError
from vqscale.processor import has_bf16

GOLDEN_COMMAND = """\
python -m torch.distributed.run \\
    --nnodes 1 \\
    --nproc-per-node 2 \\
    --max-restarts 1 \\
    --rdzv-backend c10d \\
    --rdzv-endpoint 127.0.0.1:0 \\
    --rdzv-id tiny-1-tokenizer-3 \\
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 \\
    --local-addr 127.0.0.1 \\
    --log-dir '/runs/with space/tiny-1/stages/tokenizer/attempt-003/ranks' \\
    --redirects 3 \\
    -m -- pipelines.train_tokenizer \\
    --run '/runs/with space/tiny-1'"""

GOLDEN_VARIABLES = [
    ("OMP_NUM_THREADS", "4", "8 cores / 2 processes"),
    ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1", "cluster.rendezvous"),
    ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30", "cluster.rendezvous (grace_s of the profile)"),
    ("NCCL_DEBUG", "WARN", "profile here"),
    ("VQSCALE_ATTEMPT", "3", "launcher"),
    ("VQSCALE_GRACE_S", "30", "profile here"),
    ("VQSCALE_STAGE_OF", "/runs/with space/tiny-1", "launcher"),
]


def golden_job() -> Job:
    recipe = tiny_recipe(resources={"processes": 2, "max_restarts": 1})
    profile = Profile(name="here", environment={"NCCL_DEBUG": "WARN"})
    run = Path("/runs/with space/tiny-1")
    return Job(recipe, profile, run, ("tokenizer",), "python", Path("/src"), {"tokenizer": Place(8)})


def test_rendered_command_is_golden() -> None:
    (command,) = LocalBackend().render(golden_job(), {"tokenizer": 3})
    assert command.shell() == GOLDEN_COMMAND
    assert [(v.name, v.value, v.source) for v in command.variables] == GOLDEN_VARIABLES
    assert command.log == Path("/runs/with space/tiny-1/stages/tokenizer/attempt-003/agent.log")


def test_render_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = LocalBackend().render(golden_job())
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    monkeypatch.chdir("/")
    assert LocalBackend().render(golden_job()) == before


def test_environment_is_allow_listed() -> None:
    (command,) = LocalBackend().render(golden_job())
    shell = {"PATH": "/bin", "NCCL_DEBUG": "INFO", "MY_TOKEN": "x", "RANK": "5", "AWS_PROFILE": "p"}
    environment = command.environment(shell)
    assert environment["PATH"] == "/bin"
    assert environment["AWS_PROFILE"] == "p"
    assert environment["NCCL_DEBUG"] == "WARN"
    assert not {"MY_TOKEN", "RANK"} & set(environment)
    assert inherited(shell, ["R*"]) == {"RANK": "5"}


def documented_credentials() -> list[str]:
    """Variables that docs/streaming.md says credentials come from."""
    page = (Path(__file__).parents[1] / "docs" / "streaming.md").read_text(encoding="utf-8")
    found = re.search(r"\*\*Credentials\*\* come from the environment \(([^)]*)\)", page)
    assert found
    return re.findall(r"`(\w+)`", found[1])


def test_credentials_reach_the_stages_and_are_not_written_down(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = documented_credentials()
    assert {"AWS_ACCESS_KEY_ID", "HF_TOKEN"} <= set(names)
    shell = {name: f"secret-of-{name}" for name in names}
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    path, run = str(write_recipe(home / "r.yaml")), home / "run"
    made = make_plan(path)
    for command in made.commands:
        assert shell.items() <= command.environment().items()
    assert "secret-of-" not in made.text() + json.dumps(made.facts())
    assert main(["submit", path, "--prepare-only", "--run", str(run)]) == 0
    assert main(["show", str(run)]) == 0
    assert main(["show", str(run), "--json"]) == 0
    written = [file.read_text(encoding="utf-8", errors="replace") for file in run.rglob("*") if file.is_file()]
    assert "secret-of-" not in "".join([capsys.readouterr().out, *written])


def test_no_rendezvous_of_several_nodes_on_localhost() -> None:
    with pytest.raises(ValueError, match="needs an endpoint"):
        agent_arguments(rdzv_id="x", processes=2, max_restarts=0, nodes=2)
    arguments = agent_arguments(rdzv_id="x", processes=2, max_restarts=0, nodes=2, endpoint="head:29400")
    assert "head:29400" in arguments
    assert "127.0.0.1" not in arguments


def test_threads() -> None:
    assert thread_environment(0, 3, 2)[0].value == "1"
    assert thread_environment(5, 3, 2)[0].value == "5"


def test_plan_shows_what_runs(home: Path) -> None:
    made = make_plan(str(write_recipe(home / "r.yaml")), overrides=["seed=7"])
    text = made.text()
    for command in made.commands:
        assert command.shell().splitlines()[-1].strip() in text
    assert "seed: 7" in text
    assert "OMP_NUM_THREADS" in text
    facts = json.loads(json.dumps(made.facts()))
    assert [stage["stage"] for stage in facts["stages"]] == list(made.job.recipe.stages)
    assert not (home / "runs").exists(), "a plan makes nothing"


def test_warnings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    path = str(write_recipe(home / "r.yaml", resources__threads=3))
    warnings = make_plan(path).warnings
    assert any("1 processes x 3 threads" in warning for warning in warnings)
    assert any("NCCL_DEBUG" in warning and "profile" in warning for warning in warnings)


def test_stages_are_checked() -> None:
    recipe = tiny_recipe()
    assert select_stages(recipe, "tokenizer, generate,pack") == ("generate", "pack", "tokenizer")
    with pytest.raises(UserError, match="no stage 'tokeniser'"):
        select_stages(recipe, "tokeniser")
    with pytest.raises(UserError, match="'prior' reads the output of 'extract'; add extract"):
        select_stages(recipe, "prior")
    with pytest.raises(UserError, match="add sample"):
        select_stages(recipe, "generate,pack,tokenizer,evaluate")
    images = tiny_recipe(data__clocks=None, data__train="a", data__validation="b")
    assert select_stages(images, "tokenizer,evaluate") == ("tokenizer", "evaluate")


def test_data_folders_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(data__clocks=None, data__train="shards/train", data__validation="s3://bucket/val")
    resolved = absolute_paths(recipe)
    assert resolved.data.train == str(tmp_path / "shards/train")
    assert resolved.data.validation == "s3://bucket/val"


def test_weights_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stages run in another directory than the one in which the recipe was submitted."""
    monkeypatch.chdir(tmp_path)
    for given, expected in (("a.pth", str(tmp_path / "a.pth")), (["a", "/b"], (str(tmp_path / "a"), "/b"))):
        recipe = tiny_recipe(tokenizer__losses={"perceptual": {"weights": given}})
        perceptual = absolute_paths(recipe).tokenizer.losses.perceptual
        assert perceptual is not None
        assert perceptual.weights == expected
        evaluate = absolute_paths(tiny_recipe(evaluate={"lpips": given, "features": "hub://a/b.pt"})).evaluate
        assert (evaluate.lpips, evaluate.features) == (expected, "hub://a/b.pt")


def test_profiles(tmp_path: Path) -> None:
    assert load_profile("local").backend == "local"
    with pytest.raises(LookupError, match="did you mean 'local'"):
        profile_path("locla")
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\nmax_processes: 1\n")
    assert load_profile(str(mine)).max_processes == 1
    mine.write_text("name: mine\nbakend: local\n")
    with pytest.raises(UserError, match="did you mean 'backend'"):
        load_profile(str(mine))


def test_profile_limits_processes(home: Path) -> None:
    small = home / "small.yaml"
    small.write_text("name: small\nmax_processes: 1\n")
    path = write_recipe(home / "r.yaml", resources__processes=2)
    with pytest.raises(UserError, match="allows 1"):
        make_plan(str(path), str(small))


@pytest.mark.parametrize(
    ("units", "device", "on", "settled"),
    [
        (True, "cpu", "local", "bf16"),
        (False, "cpu", "local", "fp32"),
        (False, "cuda", "local", "bf16"),
        (True, "cpu", "slurm-gpu", "fp32"),
        (False, "auto", "slurm-gpu", "bf16"),
    ],
)
def test_precision_is_settled_by_the_machine(
    units: bool, device: str, on: str, settled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was named stays; bf16 that this processor has to imitate is warned of."""
    monkeypatch.setattr(precision, "has_bf16", lambda: units)
    monkeypatch.setattr(precision, "_GPUS", ())
    settings = {"resources__device": device, "tokenizer__training__precision": "auto"}
    recipe = tiny_recipe(**settings, prior__training__precision="bf16")
    profile = load_profile(on)
    found = precision.settle(recipe, profile)
    assert (found.tokenizer.training.precision, found.prior.training.precision) == (settled, "bf16")
    slow = precision.slow_stages(found, profile)
    assert [text.startswith("prior: this processor has no units") for text in slow] == (
        [True] if on == "local" and not units and device == "cpu" else []
    )


def test_a_plan_says_the_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    made = make_plan("quickstart", overrides=["prior.training.precision=bf16"], run=tmp_path / "run")
    assert made.job.recipe.tokenizer.training.precision == "fp32"
    assert "device: cpu, ddp, fp32, " in made.text()
    assert any("use prior.training.precision=auto" in warning for warning in made.warnings)


def test_flags_of_processors(tmp_path: Path) -> None:
    for text, found in (
        ("model name\t: X\nflags\t\t: fpu avx2 avx512f\n", False),
        ("flags\t\t: fpu avx512_bf16\n", True),
        ("Features\t: asimd bf16 sve\n", True),
        ("", False),
    ):
        path = tmp_path / str(len(text))
        path.write_text(text)
        assert has_bf16(str(path)) is found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("grace_s: yes", "grace_s is true; write a number"),
        ("grace_s: 030", "grace_s is 030; write a number without zeros before it"),
        ("slurm: {nodes: true, cpus_per_task: 1}", "slurm.nodes is true; write a number"),
        ("network: {within_gb_s: .inf}", "'network.within_gb_s' is inf"),
        ("name: again", "stands there twice"),
    ],
)
def test_a_profile_is_as_strict_as_a_recipe(line: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"name: mine\n{line}\n")
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    assert expected in str(caught.value)
