"""The doctor's verdicts: none of sound machines, one of each planted fault; ranks that meet; fake and real programs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml

from cluster.devslurm import _free_ports
from cluster.preflight import host as host_module
from cluster.preflight import sharing
from cluster.preflight.collective import Meeting
from cluster.preflight.disk import Folder, judge_folder, look_at_folder
from cluster.preflight.gpus import Gpus, judge_gpus, look_at_gpus
from cluster.preflight.host import Host, judge_host, judge_interfaces, look_at_host
from cluster.preflight.judge import ASKER, judge_nodes
from cluster.preflight.node import ENDPOINT, INDEX, _port_fault
from cluster.preflight.packages import installed, judge_packages, read_constraints, required
from cluster.preflight.reading import Reading, read_shards
from cluster.preflight.report import MARK, Report, Torch, from_lines, to_lines
from cluster.preflight.verdict import Verdict
from cluster.profile import Profile
from cluster.rendezvous import NODE
from launcher import doctor as doctor_module
from launcher import process
from launcher.backends.everywhere import Errand, run_everywhere
from launcher.cli import main
from launcher.commands.doctor import _nodes, folded
from tests import sshd
from tests.ranks import LIMIT_S
from tests.waiting import until
from vqscale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
needs_sshd = pytest.mark.skipif(bool(sshd.missing()), reason=sshd.missing() or "-")
HOST = Host(
    python="3.11.7",
    packages={"torch": "2.13.0", "numpy": "2.4.6"},
    code="0123456789abcdef",
    cores=8,
    open_files=65_536,
    locked_memory=-1,
    infiniband=True,
    shm_free=16 << 30,
    synchronised=True,
    interfaces=["lo", "ib0"],
)
GPU = {
    "index": "0",
    "name": "NVIDIA H200",
    "temperature.gpu": "41",
    "ecc.errors.uncorrected.volatile.total": "0",
    "remapped_rows.pending": "No",
    "clocks_event_reasons.active": "0x0000000000000001",
}
NODES = ("a", "b")
CLUSTER = Profile.model_validate(
    {
        "name": "big",
        "backend": "slurm",
        "slurm": {"cpus_per_task": 8, "gpus_per_node": 1},
        "environment": {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"},
        "floors": {"all_reduce_gb_s": 100, "read_mb_s": 500, "write_mb_s": 200},
    }
)


def report(node: str, **changes: object) -> Report:
    sound = Report(
        node=node,
        host=HOST,
        gpus=Gpus([GPU]),
        torch=Torch(gpus=1, cuda="12.8"),
        folder=Folder("/shared/runs", 10**12, 900.0),
        sees=[*NODES, ASKER],
        token_fault="",
        port_fault="",
        reading=Reading("s3://bucket/train", 10**9, 1.0),
        meeting=Meeting(2, "nccl", 3.0, 180.0, True),
        meeting_fault="",
    )
    return replace(sound, **changes)  # type: ignore[arg-type]


def judged(second: Report | None, ahead: float = -0.05, sees: tuple[str, ...] = NODES) -> list[Verdict]:
    """Verdicts over a sound node and another one."""
    reports = [report("a"), *([second] if second else [])]
    return judge_nodes(reports, 2, HOST, CLUSTER, sees=sees, hellos={"a": -0.05, "b": ahead}, said="srun: error: no")


def test_sound_machines_pass() -> None:
    verdicts = judged(report("b"))
    assert {verdict.word for verdict in verdicts} == {"ok"}
    assert not any(verdict.mend for verdict in verdicts)
    assert len({verdict.check for verdict in verdicts}) == 17


@pytest.mark.parametrize(
    ("changes", "check", "word", "value", "mend"),
    [
        ({"host": replace(HOST, python="3.12.1")}, "equal versions", "FAIL", "3.12.1 on b, 3.11.7 here", "one env"),
        ({"host": replace(HOST, packages={"numpy": "2.4.6"})}, "equal versions", "FAIL", "torch is missing", "one env"),
        ({"host": replace(HOST, code="f" * 64)}, "equal versions", "FAIL", "code ffffffff on b", "one copy"),
        ({"host": replace(HOST, open_files=1024)}, "open files", "warn", "1024", "ulimit -n 4096"),
        ({"host": replace(HOST, locked_memory=65_536)}, "locked memory", "FAIL", "0.1 MB", "LimitMEMLOCK"),
        ({"host": replace(HOST, shm_free=64 << 20)}, "shared memory", "warn", "0.1 GB free", "--shm-size"),
        ({"host": replace(HOST, shm_free=None)}, "shared memory", "n/a", "no /dev/shm", ""),
        ({"host": replace(HOST, synchronised=False)}, "clock", "warn", "not synchronised", "chronyd"),
        ({"host": replace(HOST, interfaces=["lo", "ib1"])}, "gloo network", "FAIL", "there are lo, ib1", "one of them"),
        ({"sees": ["b"]}, "shared folder", "FAIL", "b does not see what this machine, a wrote", "VQSCALE_RUNS"),
        ({"token_fault": "Read-only file system"}, "shared folder", "FAIL", "b cannot write: Read", "VQSCALE_RUNS"),
        ({"folder": Folder("/r", 10**12, 90.0)}, "write and sync", "FAIL", "90 MB/s", "VQSCALE_RUNS"),
        ({"folder": Folder("/r", 10**9, 900.0)}, "disk space", "warn", "1.0 GB free", "prune"),
        ({"folder": Folder("/r", 0, 0.0, "No space left")}, "run folder", "FAIL", "No space left", "VQSCALE_RUNS"),
        ({"reading": Reading("s3://b", 10**8, 1.0)}, "read shards", "FAIL", "100 MB/s", "cache"),
        ({"reading": Reading("s3://b", 0, 0.0, "no access")}, "read shards", "FAIL", "no access", "credentials"),
        ({"port_fault": "10.0.0.1:20007: in use"}, "rendezvous", "FAIL", "b: port 10.0.0.1:20007", "ports"),
        ({"meeting": None, "meeting_fault": "timeout"}, "rendezvous", "FAIL", "b: timeout", "GLOO_SOCKET_IFNAME"),
        ({"meeting": Meeting(2, "nccl", 3.0, 180.0, False)}, "rendezvous", "FAIL", "the sum is wrong", "ports"),
        ({"meeting": Meeting(2, "nccl", 3.0, 12.5, True)}, "all-reduce", "FAIL", "12.5 GB/s", "NCCL_DEBUG"),
        ({"torch": Torch(0, "12.8")}, "GPUs", "FAIL", "torch sees 0, nvidia-smi 1", "driver's CUDA"),
        ({"torch": Torch(0, "12.8"), "gpus": Gpus([])}, "GPUs", "FAIL", "nvidia-smi 0 (none)", "slurm.gpus_per_node"),
        ({"torch": Torch(0)}, "GPUs", "warn", "torch is built without CUDA", "built for GPUs"),
        ({"gpus": Gpus([], "Unable to determine the device")}, "GPUs", "FAIL", "Unable to determine", "reboot"),
        (
            {"gpus": Gpus([{**GPU, "ecc.errors.uncorrected.volatile.total": "3"}])},
            *("GPU 0", "FAIL", "3 uncorrected ECC errors", "drain"),
        ),
        ({"gpus": Gpus([{**GPU, "remapped_rows.pending": "Yes"}])}, "GPU 0", "FAIL", "wait to be remapped", "reset"),
        (
            {"gpus": Gpus([{**GPU, "clocks_event_reasons.active": "0x0000000000000048"}])},
            *("GPU 0", "warn", "41 °C, slowed by heat, slowed by the hardware", "cooling"),
        ),
    ],
)
def test_each_fault_is_named_and_nothing_else(
    changes: dict[str, object], check: str, word: str, value: str, mend: str
) -> None:
    bad = [verdict for verdict in judged(report("b", **changes)) if verdict.word != "ok"]
    assert [(verdict.check, verdict.word) for verdict in bad] == [(check, word)]
    assert value in bad[0].value
    assert mend in bad[0].mend


@pytest.mark.parametrize(("ahead", "word"), [(0.9, "ok"), (-0.9, "ok"), (3.0, "warn"), (-70.0, "FAIL")])
def test_clocks_are_compared(ahead: float, word: str) -> None:
    verdict = next(one for one in judged(report("b"), ahead) if one.check == "clock offset" and one.where == "b")
    assert verdict.word == word
    assert ("behind" in verdict.value) == (ahead < 0)


def test_nodes_that_do_not_answer_fail() -> None:
    first, *others = judged(None, sees=("a",))
    assert (first.check, first.word, first.value) == ("nodes", "FAIL", "1 of 2 answered: srun: error: no")
    assert len(others) > 10, "what the others say is told all the same"
    nobody = judge_nodes([], 2, HOST, CLUSTER, sees=(), hellos={}, said="srun: error: no")
    assert [(verdict.check, verdict.word) for verdict in nobody] == [("nodes", "FAIL")]


def test_what_the_login_node_does_not_see_is_not_shared() -> None:
    (verdict,) = (verdict for verdict in judged(report("b"), sees=("a",)) if verdict.word != "ok")
    assert (verdict.check, verdict.value) == ("shared folder", "this machine does not see what b wrote")


def test_many_nodes_are_a_line_where_they_agree() -> None:
    slow = report("b", folder=Folder("/shared/runs", 10**12, 1900.0), host=replace(HOST, open_files=1024))
    lines = {(one.check, one.word): one for one in folded(judged(slow))}
    assert (lines["write and sync", "ok"].where, lines["write and sync", "ok"].value) == (
        "2 nodes",
        "900 MB/s to 1,900 MB/s",
    )
    assert lines["open files", "ok"].where == "a"
    assert lines["open files", "warn"].where == "b"
    assert not any(one.where == "all nodes" for one in folded(judged(slow)))


def test_packages_are_those_that_were_tested(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# tested\ntorch==2.13.0\nNumPy==2.0.0\nPyYAML==6.0\n")
    constraints = read_constraints(tmp_path / "constraints.txt")
    there = {"torch": "2.13.0+cpu", "numpy": "2.4.6"}
    whole, versions = judge_packages("here", there, ["torch", "pyyaml"], constraints)
    assert (whole.word, whole.value) == ("FAIL", "lacks pyyaml")
    assert (versions.word, versions.value) == ("warn", "torch 2.13.0+cpu; not as tested: numpy 2.4.6 (2.0.0)")
    good = judge_packages("here", there, ["torch"], {"torch": "2.13.0", "absent": "1.0"})
    assert [one.word for one in good] == ["ok", "ok"]
    assert judge_packages("here", there, [], read_constraints(tmp_path / "none"))[1].word == "n/a"
    assert {"torch", "accelerate", "pydantic"} <= set(required()) <= set(installed())
    assert "deepspeed" not in required()


def test_interfaces_as_nccl_reads_them() -> None:
    def word(text: str) -> str:
        return "".join(verdict.word for verdict in judge_interfaces("a", HOST, {"NCCL_SOCKET_IFNAME": text}))

    assert [word(text) for text in ("ib", "=ib0", "eth0,ib0", "eth", "^lo", "")] == ["ok", "ok", "ok", "FAIL", "", ""]


def test_this_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = look_at_folder(tmp_path, "x", megabytes=2)
    assert folder.write_mb_s > 0
    assert folder.free > 0
    assert not list(tmp_path.iterdir())
    assert judge_folder("here", folder, floor=1e9)[1].word == "FAIL"
    lost = look_at_folder(tmp_path / "none", "x")
    assert judge_folder("here", lost, None)[0].value.endswith("none: No such file or directory")
    monkeypatch.setattr(host_module.resource, "getrlimit", lambda which: (256, 512))
    assert "warn" in [verdict.word for verdict in judge_host("here", look_at_host()) if verdict.check == "open files"]


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus_of_an_older_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One field that a driver does not know spoils no other."""
    script = """case "$1" in
*index,name*) echo '0, NVIDIA A100, 38'; echo '1, NVIDIA A100, 91';;
*ecc*) echo '0'; echo '[N/A]';;
*throttle*) echo '0x0000000000000000'; echo '0x0000000000000020';;
*) echo "Field is not a valid field to query."; exit 2;;
esac"""
    nvidia_smi(tmp_path, monkeypatch, script)
    words = [(one.check, one.word, one.value) for one in judge_gpus("a", look_at_gpus(), 2, 2, built=True)]
    assert words == [
        ("GPUs", "ok", "torch sees 2, nvidia-smi 2 (NVIDIA A100)"),
        ("GPU 0", "ok", "38 °C"),
        ("GPU 1", "warn", "91 °C, slowed by heat"),
    ]


def test_a_broken_driver_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, 'echo "couldn\'t communicate with the NVIDIA driver"; exit 9')
    (verdict,) = judge_gpus("a", look_at_gpus(), 0, 0, built=True)
    assert (verdict.word, verdict.value) == ("FAIL", "nvidia-smi: couldn't communicate with the NVIDIA driver")


def test_tokens_of_an_earlier_trial_do_not_count(tmp_path: Path) -> None:
    assert sharing.leave(tmp_path, "a", "old") == ""
    assert sharing.leave(tmp_path, "b", "new") == ""
    assert sharing.seen(tmp_path, "new") == ["b"]
    assert sharing.await_all(tmp_path, "new", 2, limit_s=0.05) == ["b"]
    assert sharing.leave(tmp_path / "none", "a", "new") == "No such file or directory"
    assert sharing.seen(tmp_path / "none", "new") == []


def test_shards_are_read_through_the_storage(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(os.urandom(1_000_000 + number))
    (tmp_path / "index.json").write_text("{}")
    assert read_shards(str(tmp_path), 1, 2).bytes == 3_000_003
    one = read_shards(f"file://{tmp_path}/2.tar", 0, 1)
    assert (one.bytes, one.fault) == (1_000_002, "")
    assert one.mb_s > 0
    assert "no such shard" in read_shards(str(tmp_path / "9.tar"), 0, 1).fault
    assert "holds no shards" in read_shards(str(ROOT / "docs"), 0, 1).fault
    assert read_shards(str(tmp_path), 0, 1, limit_s=0).bytes == 0, "it ends in time"


def test_reports_are_read_among_other_lines() -> None:
    """Those of two nodes come at the same time, with what srun says between them."""
    told = report("a", reading=None, meeting=None)
    first, second = to_lines("a", {"report": asdict(told)}), to_lines("b", {"report": asdict(report("b"))})
    assert len(first) > 1
    assert max(map(len, first)) < 600
    mixed = [line for pair in zip_longest(first, second, fillvalue="srun: job 7 queued") for line in pair]
    trees = list(from_lines(f"{line}\n" for line in (f"node: {MARK}torn", *mixed, "bye")))
    assert [Report.parse(tree["report"]) for tree in trees] == [told, report("b")]
    assert not list(from_lines(first[:-1])), "one that was cut off is none"


def node(folder: Path, index: int, endpoint: str, name: str = "") -> subprocess.Popen[str]:
    """A node of two on this machine, as a backend starts it."""
    argv = ("--folder", str(folder), "--token", "t", "--nodes", "2", "--patience", "1")
    place = {NODE: name or f"n{index}", INDEX: str(index), ENDPOINT: endpoint}
    own = {**place, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.preflight.node", *argv],
        cwd=ROOT,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.dist
def test_nodes_meet_and_do_not_share_a_folder(tmp_path: Path) -> None:
    """Two real nodes over gloo; each has a folder of its own under what should be one name."""
    (port,) = _free_ports(1)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    running = [node(folder, index, f"127.0.0.1:{port}") for index, folder in enumerate(folders)]
    printed = [one.communicate(timeout=LIMIT_S)[0] for one in running]
    trees = [tree for text in printed for tree in from_lines(text.splitlines())]
    reports = [Report.parse(tree["report"]) for tree in trees if "report" in tree]
    assert [(one.node, one.sees) for one in reports] == [("n0", ["n0"]), ("n1", ["n1"])]
    meetings = [one.meeting for one in reports]
    assert all(meeting and meeting.world == 2 and meeting.right and meeting.gb_s > 0 for meeting in meetings), printed
    profile = Profile(name="x", environment={"GLOO_SOCKET_IFNAME": "lo"})
    found = judge_nodes(reports, 2, look_at_host(), profile, sees=["n0"], hellos={})
    assert [verdict.check for verdict in found if verdict.word == "FAIL"] == ["shared folder"]


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
        assert _port_fault(endpoint).startswith(f"{endpoint}: ")
    assert _port_fault(endpoint) == ""


@pytest.mark.dist
@pytest.mark.fault
def test_a_node_that_is_ended_leaves_no_process(tmp_path: Path) -> None:
    """While its agent waits for a node that never comes."""
    (port,) = _free_ports(1)
    name = f"lonely-{port}"
    alone = node(tmp_path, 0, f"127.0.0.1:{port}", name=name)
    try:
        until(lambda: len(process.tagged(NODE, name)) >= 2)
    finally:
        alone.terminate()
        alone.communicate(timeout=LIMIT_S)
    assert alone.returncode == 143
    assert not process.tagged(NODE, name)


@pytest.mark.dist
def test_doctor_on_this_machine(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    shards = home / "shards"
    shards.mkdir()
    (shards / "0.tar").write_bytes(os.urandom(2_000_000))
    profile = home / "own.yaml"
    floors = {"all_reduce_gb_s": 1e6, "read_mb_s": 1e-3}
    profile.write_text(yaml.safe_dump({"name": "own", "environment": {"GLOO_SOCKET_IFNAME": "lo"}, "floors": floors}))
    assert main(["doctor", "--on", str(profile), "--shards", "shards", "--json"]) == 1
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)}
    assert [check for check, one in found.items() if one["word"] == "FAIL"] == ["all-reduce"]
    assert found["all-reduce"]["limit"] == "at least 1e+06 GB/s"
    assert found["rendezvous"]["value"].startswith("2 ranks over gloo")
    assert found["read shards"]["word"] == "ok"
    assert found["shared folder"]["word"] == "ok"
    assert not (home / "runs").exists(), "nothing is left"


def test_missing_programs_end_it_before_nodes_are_asked(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(home))
    assert main(["doctor", "--on", "devslurm"]) == 1
    printed = capsys.readouterr().out
    assert "lacks sbatch, srun, squeue, scancel, scontrol, sinfo" in printed
    assert "mend: go to a login node, or install them" in printed
    assert "answered" not in printed


def test_slurm_that_does_not_answer(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = home / "bin"
    programs.mkdir()
    for name in doctor_module._PROGRAMS["slurm"]:
        (programs / name).write_text("#!/bin/sh\necho 'sinfo: error: no controller' >&2; exit 1\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    assert main(["doctor", "--on", "devslurm"]) == 1
    assert "FAIL  here       Slurm            sinfo: no controller" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--nodes", "2"), "profile local is one machine"),
        (("--nodes", "0"), "choose 1 or more"),
        (("--wait", "0"), "choose 1 or more"),
        (("--on", "nowhere"), "no profile 'nowhere'"),
    ],
)
def test_wrong_words_are_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    assert main(["doctor", "--json", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_an_errand_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    profile = Profile(name="x", environment={"PYTHONPATH": str(tmp_path)})
    began = time.monotonic()
    lines = list(run_everywhere(Errand(profile, "endless", (), tmp_path, nodes=1, wait_s=0, limit_s=1)))
    assert lines in (["begun\n"], [])
    assert time.monotonic() - began < LIMIT_S, "it would sleep for longer"


def test_srun_is_asked_for_what_stages_get_and_no_value_is_read_as_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against stand-ins for srun and scontrol that show their arguments and play the node."""
    srun = 'echo "$@" > asked; while [ "$1" != bash ]; do shift; done; exec env SLURM_JOB_ID=12345 "$@"'
    scontrol = 'case "$2" in hostnames) echo n0; echo n1;; node) echo "   NodeAddr=10.0.0.1 Port=1";; esac'
    for name, text in (("srun", srun.replace("asked", str(tmp_path / "asked"))), ("scontrol", scontrol)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    names = [NODE, INDEX, ENDPOINT, "EVIL"]
    (tmp_path / "told.py").write_text(f"import os, sys\nprint(*(os.environ[n] for n in {names}), sys.argv[1:])")
    slurm = {"cpus_per_task": 4, "partition": "p", "exclude": ["n7"]}
    place = f"export SLURMD_NODENAME=n1 SLURM_NODEID=1 SLURM_JOB_NODELIST='n[0-1]' PYTHONPATH={tmp_path}"
    profile = Profile.model_validate(
        {
            "name": "x",
            "backend": "slurm",
            "slurm": {**slurm, "setup": [place], "options": ["--nice=5"]},
            "environment": {"EVIL": "'; exit 1; $(exit 2) `exit 3`"},
        }
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (line,) = run_everywhere(Errand(profile, "told", ("it's", "$HOME"), tmp_path, nodes=2, wait_s=9, limit_s=100))
    assert line == "n1 1 10.0.0.1:22345 '; exit 1; $(exit 2) `exit 3` [\"it's\", '$HOME']\n"
    asked = (tmp_path / "asked").read_text().split(" bash -c ")[0].split()
    assert {"--nodes=2", "--ntasks=2", "--partition=p", "--exclude=n7", "--cpus-per-task=4", "--nice=5"} <= set(asked)
    assert {"--immediate=9", "--time=3"} <= set(asked)
    assert not any(option.startswith(("--gpus", "--mem", "--account")) for option in asked)


@pytest.fixture(scope="module")
def ssh_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sshd.server(tmp_path_factory.mktemp("sshd"), ("one", "two")) as client:
        yield client


def over_ssh(config: Path, *hosts: str, **environment: str) -> dict[str, object]:
    ssh = {"hosts": [f"{host} slots=1 address=127.0.0.1" for host in hosts], "cores": 2, "config": str(config)}
    return {"name": "hosts", "backend": "ssh", "environment": environment, "ssh": ssh, "grace_s": 3}


@needs_sshd
@pytest.mark.dist
def test_hosts_over_ssh_are_asked(ssh_config: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = home / "hosts.yaml"
    profile.write_text(yaml.safe_dump(over_ssh(ssh_config, "one", "two", GLOO_SOCKET_IFNAME="lo")))
    assert main(["doctor", "--on", str(profile), "--json"]) == 0
    told = {(one["where"], one["check"]): one["value"] for one in json.loads(capsys.readouterr().out)}
    assert told["all nodes", "nodes"] == "2 of 2 answered"
    assert told["all nodes", "rendezvous"].startswith("2 ranks over gloo")
    assert told["all nodes", "shared folder"].endswith("each sees the others' files")
    assert told["here", "programs"] == "ssh"
    assert {("one", "clock offset"), ("two", "clock offset")} <= told.keys()


@needs_sshd
def test_a_host_that_cannot_be_reached_does_not_silence_the_others(ssh_config: Path, tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(f"import os\nprint(os.environ[{NODE!r}], os.environ[{INDEX!r}])")
    profile = Profile.model_validate(over_ssh(ssh_config, "one", "lost.invalid", "two", PYTHONPATH=str(tmp_path)))
    lines = list(run_everywhere(Errand(profile, "told", (), tmp_path, nodes=3, wait_s=0, limit_s=60)))
    assert {"one: one 0\n", "two: two 2\n"} <= set(lines)
    assert any(line.startswith("lost.invalid: ") for line in lines)
    with pytest.raises(UserError, match="profile hosts has 3 hosts"):
        run_everywhere(Errand(profile, "told", (), tmp_path, nodes=4, wait_s=0, limit_s=60))
    without = profile.without(["lost.invalid"])
    lines = list(run_everywhere(Errand(without, "told", (), tmp_path, nodes=2, wait_s=0, limit_s=60)))
    assert sorted(lines) == ["one: one 0\n", "two: two 1\n"]


@pytest.mark.parametrize(
    ("words", "exclude", "expected"),
    [
        (("--nodes", "3"), ("b",), "3 nodes; profile hosts has 2 hosts that are not excluded"),
        ((), ("a", "b", "c"), "1 nodes; profile hosts has 0 hosts that are not excluded"),
    ],
)
def test_nodes_that_there_are_not_are_refused_before_anything_is_checked(
    home: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], exclude: tuple[str, ...], expected: str
) -> None:
    profile = over_ssh(home / "config", "a", "b", "c")
    path = home / "hosts.yaml"
    path.write_text(yaml.safe_dump({**profile, "ssh": {**dict(profile["ssh"]), "exclude": list(exclude)}}))  # type: ignore[call-overload]
    assert main(["doctor", "--on", str(path), *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: --nodes: {expected}\n"
    assert main(["doctor", "--nodes", "2"]) == 2
    assert capsys.readouterr().out == ""


def test_excluded_hosts_are_not_asked_by_the_doctor(home: Path) -> None:
    profile = Profile.model_validate(over_ssh(home / "config", "a", "b", "c")).without(["b"])
    assert _nodes(None, profile) == 2


def test_what_setuptools_brings_along_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("_vendor", "packages"):
        info = tmp_path / folder / f"from{folder.strip('_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: from{folder.strip('_')}\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    there = installed()
    assert there["frompackages"] == "1.0"
    assert "fromvendor" not in there
