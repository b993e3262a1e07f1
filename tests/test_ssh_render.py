"""What is sent to hosts over ssh: golden text, hostile values, hostfiles. Needs no sshd."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.profile import Profile
from cluster.ssh import ALLOWED, Host, SshSettings, parse_host, parse_hostfile
from launcher.backends.base import Job, Place
from launcher.backends.ssh import SshBackend, connect
from launcher.cli import main
from launcher.hosts import Spec
from launcher.plan import load_profile, make_plan
from tests.recipes import tiny_recipe, write_recipe
from vqscale.errors import UserError

GOLDEN_SSH = [
    *("ssh", "-T", "-a", "-x", "-l", "me", "-p", "2222", "-o", "ProxyJump=login"),
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5"),
    *("-o", "ServerAliveCountMax=3", "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes"),
    *("--", "gpu2", "cd '/src with space' && exec /venv/bin/python -m launcher.on_host"),
]
GOLDEN_AGENT = """\
/venv/bin/python -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --max-restarts 1 --rdzv-backend c10d
--rdzv-endpoint 10.0.0.1:25177 --rdzv-id tiny-1-tokenizer-3 --rdzv-conf is_host=0
--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 --local-addr 10.0.0.2
--log-dir '/runs/with space/tiny-1/stages/tokenizer/attempt-003/ranks' --redirects 3
-m -- pipelines.train_tokenizer --run '/runs/with space/tiny-1'
"""
HOSTS = ("gpu1 slots=2 address=10.0.0.1", "gpu2 slots=2 address=10.0.0.2", "gpu3 slots=2")


def golden_job(**changes: Any) -> Job:
    recipe = tiny_recipe(resources={"processes": 4, "max_restarts": 1, "device": "cpu"}, data__streams=4)
    ssh = SshSettings(hosts=HOSTS, cores=16, user="me", port=2222, options=("ProxyJump=login",))
    profile = Profile(name="here", backend="ssh", environment={"NCCL_DEBUG": "WARN"}, ssh=ssh)
    profile = profile.model_copy(update=changes)
    run = Path("/runs/with space/tiny-1")
    source = Path("/src with space")
    return Job(recipe, profile, run, ("tokenizer",), "/venv/bin/python", source, {"tokenizer": Place(16, 2)})


def test_what_is_sent_is_golden() -> None:
    (command,) = SshBackend().render(golden_job(), {"tokenizer": 3})
    assert command.argv[1:] == ("-m", "launcher.hosts", "/runs/with space/tiny-1/stages/tokenizer/hosts.json")
    spec = Spec(**json.loads(command.script))
    assert [host["host"] for host in spec.hosts] == ["gpu1", "gpu2"], "as few as hold the processes"
    assert spec.hosts[1]["ssh"] == shlex.join(GOLDEN_SSH)
    assert spec.hosts[1]["runs"] == " ".join(GOLDEN_AGENT.split("\n")).strip()
    first, second = (shlex.split(host["runs"]) for host in spec.hosts)
    differing = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert differing == [("is_host=1", "is_host=0"), ("10.0.0.1", "10.0.0.2")]
    assert spec.environment["NCCL_DEBUG"] == "WARN"
    assert spec.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert spec.environment["OMP_NUM_THREADS"] == "8"


def test_render_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SshBackend().render(golden_job())
    for name in ("OMP_NUM_THREADS", "SSH_AUTH_SOCK", "AWS_PROFILE"):
        monkeypatch.setenv(name, "99")
    monkeypatch.chdir("/")
    assert SshBackend().render(golden_job()) == before


def test_each_attempt_meets_at_a_port_of_its_own() -> None:
    def endpoint(attempt: int) -> str:
        (command,) = SshBackend().render(golden_job(), {"tokenizer": attempt})
        argv = shlex.split(json.loads(command.script)["hosts"][0]["runs"])
        return argv[argv.index("--rdzv-endpoint") + 1]

    ports = {int(endpoint(attempt).partition(":")[2]) for attempt in range(1, 20)}
    assert len(ports) > 15
    assert min(ports) >= 20000
    assert max(ports) < 30000


PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30).map(lambda text: f"/x{text}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(python=PATHS, directory=PATHS)
def test_a_remote_shell_reads_no_value(python: str, directory: str) -> None:
    ssh = SshSettings(hosts=("gpu1 slots=1",), cores=1, python=python, directory=directory)
    *_, remote = connect(ssh, parse_host(ssh.hosts[0]), python, directory)
    shown = remote.replace("cd ", "printf '%s\\n' ", 1).replace("&& exec ", "&& printf '%s\\n' ", 1)
    printed = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True).stdout
    assert printed == f"{directory}\n{python}\n-m\nlauncher.on_host\n"


@pytest.mark.parametrize(
    "change",
    [
        {"hosts": ("-oProxyCommand=x slots=1",)},
        {"hosts": ("a;b slots=1",)},
        {"hosts": ("me@gpu1 slots=1",)},
        {"hosts": ("gpu1 slots=1", "gpu1 slots=1")},
        {"hosts": ("gpu1",)},
        {"hosts": ("gpu1 slots=1\ngpu2 slots=1", "gpu2 slots=1")},
        {"hosts": ()},
        {"exclude": ("a;b",)},
        {"hostfile": "hosts"},
        {"user": "-l"},
        {"user": "a b"},
        {"port": 0},
        {"config": "relative"},
        {"python": "/x\n"},
        {"options": ("ProxyCommand=touch canary",)},
        {"options": ("LocalCommand=touch canary", "PermitLocalCommand=yes")},
        {"options": ("proxycommand=x",)},
        {"options": ("-F/etc/x",)},
        {"options": ("IdentityFile=a\nProxyCommand=b",)},
        {"options": ("BatchMode=no",)},
    ],
)
def test_what_could_do_something_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SshSettings(**{"hosts": ("gpu1 slots=1",), "cores": 1, **change})


def test_allowed_options_run_no_command() -> None:
    others = ("Match", "Include", "SendEnv", "SetEnv", "ForwardAgent", "ControlPath", "PKCS11Provider")
    assert not [name for name in ALLOWED if "Command" in name or name in others]


def test_a_hostfile_of_deepspeed() -> None:
    text = "# two machines\nworker-1 slots=4\n\n  worker-2\tslots=8  # the new one\nworker-3\n10.0.0.7 slots=1\n"
    assert [parse_host(entry) for entry in parse_hostfile(text)] == [
        Host("worker-1", 4, "worker-1"),
        Host("worker-2", 8, "worker-2"),
        Host("worker-3", None, "worker-3"),
        Host("10.0.0.7", 1, "10.0.0.7"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a slots=1\nb slots=0\n", "line 2"),
        ("a slots=-1", "line 1"),
        ("a slots=x", "line 1"),
        ("a slot=1", "write `NAME slots=N`"),
        ("a b", "line 1"),
        ("a slots=1\n\na slots=2", "line 3: host a stands there twice"),
        ("# nothing\n", "names no host"),
        ("$(touch canary) slots=1", "line 1"),
    ],
)
def test_faulty_hostfiles_are_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        parse_hostfile(text)


def test_a_hostfile_becomes_part_of_the_plan(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the profile; the run's record then needs it no more."""
    profile = home / "mine.yaml"
    profile.write_text("name: mine\nbackend: ssh\nssh: {hostfile: hosts.txt, cores: 4}\n")
    with pytest.raises(UserError, match=r"hosts\.txt: No such file"):
        load_profile(str(profile))
    (home / "hosts.txt").write_text("gpu1 slots=1\ngpu2\n")
    with pytest.raises(UserError, match=r"host gpu2 does not say how many processes it holds; write `slots=N`"):
        load_profile(str(profile))
    (home / "hosts.txt").write_text("gpu1 slots=1\ngpu2 slots=1\n")
    made = make_plan(str(write_recipe(home / "r.yaml", resources__processes=2)), str(profile))
    assert made.job.profile.ssh is not None
    assert (made.job.profile.ssh.hosts, made.job.profile.ssh.hostfile) == (("gpu1 slots=1", "gpu2 slots=1"), None)
    assert Profile.model_validate(made.job.profile.model_dump(mode="json")) == made.job.profile
    assert main(["plan", str(home / "r.yaml"), "--on", str(profile), "resources.processes=4", "data.streams=4"]) == 2
    told = capsys.readouterr().err
    assert "4 processes cannot be shared evenly by the first hosts (slots: gpu1 1, gpu2 1)" in told
    assert len(told.splitlines()) == 1


def test_hosts_are_used_from_the_first_on() -> None:
    ssh = SshSettings(hosts=("a slots=2", "b slots=4", "c"), cores=1, slots=8)
    assert {n: [host.name for host in ssh.used(n)] for n in (1, 2, 4, 6)} == {
        1: ["a"], 2: ["a"], 4: ["a", "b"], 6: ["a", "b", "c"],
    }  # fmt: skip
    with pytest.raises(ValueError, match="5 processes"):
        ssh.used(5)
    assert [host.name for host in ssh.without(["a"]).used(4)] == ["b"]
    assert ssh.can_spare(["b"], 4)
    assert not ssh.can_spare(["c"], 6)


@pytest.mark.parametrize("name", ["ssh-hosts", "workstation"])
def test_plan_prints_what_is_sent(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(home / "r.yaml", resources={"processes": 4, "device": "cpu"}, data__streams=4)
    assert main(["plan", str(path), "--on", name, "--run", str(home / "mine")]) == 0
    printed = capsys.readouterr().out
    made = make_plan(str(path), name, run=home / "mine")
    for command in made.commands:
        assert "\n".join(f"    | {line}".rstrip() for line in command.script.splitlines()) in printed
        assert command.shell().splitlines()[-1].strip() in printed
