"""The chain of jobs of a run, with stand-ins for Slurm's commands: submitted, recorded, looked at, cancelled."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import registry
from launcher.backends import slurm_queue
from launcher.backends.slurm import SlurmBackend
from launcher.cli import main
from launcher.plan import make_plan
from launcher.rundir import create
from launcher.state import RunState
from launcher.status import read_status
from tests.processor import in_imports
from tests.recipes import write_recipe
from tests.slurm_stand_ins import queued, stand_in
from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def layout(home: Path, fakes: Path) -> RunLayout:
    recipe = write_recipe(home / "r.yaml", resources={"processes": 2, "device": "cpu"})
    return create(make_plan(str(recipe), "devslurm", run=home / "mine", stages="generate,pack"))


def test_a_chain_is_submitted_whole(layout: RunLayout, fakes: Path) -> None:
    queued(fakes)
    stand_in(fakes, "sbatch", 'cd "$(dirname "$0")"; echo "$@" >> sent; echo "$(wc -l < sent | tr -d " ")0;cluster"')
    poll = SlurmBackend().submit(layout)
    assert (poll.alive, poll.words) == (True, "Slurm jobs 10, 20")
    assert (fakes / "sent").read_text().splitlines() == [
        f"--parsable --hold {layout.script('generate')}",
        f"--parsable --dependency=afterok:10 --kill-on-invalid-dep=yes {layout.script('pack')}",
    ]
    planned = make_plan(str(layout.recipe), "devslurm", run=layout.root, stages="generate,pack").commands
    assert [layout.script(command.stage).read_text() for command in planned] == [c.script for c in planned]
    assert read_json(layout.slurm)["jobs"] == {"generate": "10", "pack": "20"}
    assert (fakes / "asked").read_text() == "release 10\n", "when both are recorded"


NUMBERS = """cd "$(dirname "$0")"; echo "$@" >> sent; echo "$(wc -l < sent | tr -d ' ')0" """
"""An `sbatch` that gives the numbers 10, 20, ..."""


def slurm_with_memory(fakes: Path, layout: RunLayout) -> None:
    """A `squeue` that knows the jobs of `sbatch` that nobody has cancelled, a `scancel` that takes them away."""
    names = 'if (NR % 2) n = "generate"; else n = "pack"'
    line = f'print NR "0|PENDING|vqscale-mine-" n "|JobHeldUser|{layout.root}"'
    stand_in(
        fakes,
        "squeue",
        f"""cd "$(dirname "$0")"; touch sent ended; awk '{{{names}; {line}}}' sent > rows
while read -r number; do sed -i "/^$number|/d" rows; done < ended; cat rows""",
    )
    stand_in(fakes, "scancel", """cd "$(dirname "$0")"; shift; for one; do echo "$one" >> ended; done""")


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_submission_that_is_killed_leaves_no_second_chain(layout: RunLayout, fakes: Path, call: int) -> None:
    """At the first job, at the second, or before the first was released: each time Slurm has taken the job."""
    slurm_with_memory(fakes, layout)
    kill = f'[ "$(wc -l < sent)" -lt {call} ] || kill -KILL $PPID'
    stand_in(fakes, "sbatch", f"{NUMBERS}; {kill}" if call < 3 else NUMBERS)
    if call == 3:
        stand_in(fakes, "scontrol", "kill -KILL $PPID")
    words = [sys.executable, "-m", "launcher", "requeue", str(layout.root)]
    assert subprocess.run(words, cwd=ROOT, check=False, capture_output=True).returncode == -signal.SIGKILL
    recorded = (read_json(layout.slurm) or {"jobs": {}})["jobs"]
    assert list(recorded.values()) == ["10", "20"][: call - 1], "all but the one that was being submitted"
    assert "--hold" in (fakes / "sent").read_text().splitlines()[0]

    stand_in(fakes, "sbatch", NUMBERS)
    stand_in(fakes, "scontrol", 'echo "$@" >> "$(dirname "$0")/asked"')
    if recorded:
        assert "Slurm job 10 (generate) is held" in read_status(layout).words
        with pytest.raises(UserError, match="is running already; vqscale cancel ends it"):
            SlurmBackend().submit(layout)
        assert main(["cancel", str(layout.root)]) == 0
    SlurmBackend().submit(layout)
    asked = slurm_queue.jobs(fresh=True)
    assert sorted(asked) == sorted(read_json(layout.slurm)["jobs"].values()), "those that were left are ended"
    assert len(asked) == 2


def test_an_answer_that_never_comes_is_no_job(layout: RunLayout, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm takes the second job and does not say so."""
    slurm_with_memory(fakes, layout)
    monkeypatch.setattr(slurm_queue, "_ANSWER_S", 2)
    stand_in(fakes, "sbatch", f'{NUMBERS}; [ "$(wc -l < sent)" -lt 2 ] || exec sleep 60')
    with pytest.raises(UserError, match="sbatch has not answered for 2 s"):
        SlurmBackend().submit(layout)
    assert (fakes / "ended").read_text().split() == ["10", "20"]
    assert not layout.slurm.exists()
    assert "prepared only" in read_status(layout).words


def test_without_a_controller_nothing_is_made(
    layout: RunLayout, fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(fakes, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    place = layout.root.with_name("other")
    words = ["submit", str(layout.root.with_name("r.yaml")), "--on", "devslurm", "--run", str(place)]
    for more in ([], ["--sweep", "seed=1,2"]):
        assert main([*words, *more]) == 2
        assert "Unable to contact slurm controller" in capsys.readouterr().err
        assert not place.exists()


def test_a_chain_that_is_refused_leaves_no_run(
    layout: RunLayout, fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command can be repeated when that is mended."""
    slurm_with_memory(fakes, layout)
    place = layout.root.with_name("other")
    words = ["submit", str(layout.root.with_name("r.yaml")), "--on", "devslurm", "--run", str(place)]
    for more in ([], ["--sweep", "seed=1,2"]):
        stand_in(fakes, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
        assert main([*words, *more]) == 2
        assert "invalid partition" in capsys.readouterr().err
        assert not place.exists()
        assert [entry.id for entry in registry.everything()] == ["mine"]
    stand_in(fakes, "sbatch", NUMBERS)
    assert main([*words, "--sweep", "seed=1,2"]) == 0


def test_a_chain_that_is_refused_leaves_no_job(layout: RunLayout, fakes: Path) -> None:
    queued(fakes)
    refuse = "*afterok*) echo 'sbatch: error: invalid partition' >&2; exit 1;;"
    stand_in(fakes, "sbatch", f'case "$*" in {refuse} *) echo 10;; esac')
    stand_in(fakes, "scancel", 'echo "$@" > "$(dirname "$0")/cancelled"')
    with pytest.raises(UserError, match="sbatch: invalid partition"):
        SlurmBackend().submit(layout)
    assert (fakes / "cancelled").read_text() == "--quiet 10\n"
    assert "prepared only" in read_status(layout).words


def test_a_slurm_that_is_not_found_names_the_mend(layout: RunLayout, fakes: Path) -> None:
    queued(fakes)
    stand_in(fakes, "sbatch", "echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1")
    with pytest.raises(UserError, match=r"configuration source; set SLURM_CONF; vqscale cluster status names"):
        SlurmBackend().submit(layout)


def test_status_compares_slurm_and_the_run_directory(layout: RunLayout, fakes: Path) -> None:
    write_json(layout.slurm, {"jobs": {"generate": "10", "pack": "20"}, "cancelled": False})
    stand_in(fakes, "sacct", "exit 1")

    def said(word: str, *rows: str) -> str:
        state = RunState.new(("generate", "pack"))
        if word != "waiting":
            state.begin("generate", 1)
            state.end("generate", word)  # type: ignore[arg-type]
        state.write(layout)
        queued(fakes, *rows)
        return read_status(layout).words

    waits = "20|PENDING|Dependency"
    assert said("waiting", "10|PENDING|Priority", waits) == (
        "waiting, Slurm job 10 (generate) waits behind jobs of higher priority (Priority)"
    )
    assert said("running", "10|RUNNING|None", waits) == "running"
    assert said("running", "10|PENDING|BeginTime", waits).startswith("running, but Slurm job 10 (generate) waits until")
    assert said("preempted", "10|PENDING|BeginTime", waits).startswith("preempted, Slurm job 10 (generate) waits until")
    stays = "failed, but Slurm job 20 (pack) waits for the stage before (Dependency)"
    assert said("failed", "10|FAILED|NonZeroExitCode", waits) == stays
    lost = "but its Slurm job 10 (TIMEOUT) is gone: vqscale requeue mine"
    assert said("running", "10|TIMEOUT|TimeLimit", "20|CANCELLED|None") == f"running, {lost}"
    assert said("running", "99|RUNNING|None") == "running, but its Slurm job 10 is gone: vqscale requeue mine"
    stand_in(fakes, "sacct", "echo '10|CANCELLED by 0|vqscale-mine-generate'")
    assert "Slurm job 10 (CANCELLED) is gone" in said("running")
    stand_in(fakes, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert "Slurm cannot be asked (squeue: Unable to contact slurm controller)" in read_status(layout).words
    assert read_status(layout).alive is None


def test_a_number_that_came_again_is_not_ours(layout: RunLayout, fakes: Path) -> None:
    write_json(layout.slurm, {"jobs": {"generate": "99"}, "cancelled": False})
    queued(fakes, "99|RUNNING|None")
    stand_in(fakes, "scancel", 'touch "$(dirname "$0")/cancelled"')
    assert read_status(layout).alive is False
    SlurmBackend().cancel(layout)
    assert not (fakes / "cancelled").exists()


def test_one_question_serves_all_runs(layout: RunLayout, fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [create(make_plan(str(layout.recipe), "devslurm", run=layout.root / f"../other-{n}")) for n in range(3)]
    for each in (layout, *others):
        write_json(each.slurm, {"jobs": {"generate": "10"}, "cancelled": False})
    stand_in(fakes, "squeue", 'echo asked >> "$(dirname "$0")/questions"; echo "10|RUNNING|x|None|/"')
    assert main(["ls"]) == 0
    assert (fakes / "questions").read_text() == "asked\n"


def test_a_hundred_jobs_cost_a_question_every_few_seconds(
    layout: RunLayout, fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A display of a hundred runs, redrawn twice a second for ten seconds, on a clock of the test's own."""
    names = [f"many-{number}" for number in range(100)]
    rows = "".join(f"{100 + n}|RUNNING|vqscale-{name}-generate|None|/\n" for n, name in enumerate(names))
    stand_in(fakes, "squeue", f'echo asked >> "$(dirname "$0")/questions"; cat <<END\n{rows}END')
    runs = []
    for number, name in enumerate(names):
        root = layout.root.with_name(name)
        shutil.copytree(layout.root, root)
        write_json(root / "slurm.json", {"jobs": {"generate": str(100 + number)}, "cancelled": False})
        runs.append(RunLayout(root))
    clock = itertools.count(1000.0, 0.5)
    now = next(clock)
    monkeypatch.setattr(slurm_queue.time, "monotonic", lambda: now)
    for _ in range(20):
        now = next(clock)
        assert all(SlurmBackend().poll(run).alive for run in runs)
    assert 3 <= len((fakes / "questions").read_text().splitlines()) <= 4


def test_submit_returns_at_once(layout: RunLayout, fakes: Path) -> None:
    """Seven jobs, with a queue that answers at once."""
    stand_in(fakes, "sbatch", 'cd "$(dirname "$0")"; echo x >> sent; wc -l < sent')
    queued(fakes)
    command = [sys.executable, "-m", "launcher", "submit", str(layout.recipe), "--on", "devslurm"]
    places = [str(layout.root.with_name(f"quick-{number}")) for number in range(3)]
    assert in_imports([[*command, "--run", place] for place in places]) < 6.5
    assert len((fakes / "sent").read_text().splitlines()) == 21


def test_without_slurm_there_is_one_clear_line(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(layout.slurm, {"jobs": {"generate": "10"}, "cancelled": False})
    monkeypatch.setenv("PATH", str(layout.root))
    slurm_queue._forget()
    for command in (["cancel", "mine"], ["requeue", "mine"]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "is not installed here" in told
        assert told.count("\n") == 1
