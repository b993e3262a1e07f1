"""The harness of the benchmarks, on made-up clocks: turns, figures, ratios, results, comparison, tables."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import machine, plots, registry, render, report, stats, timing
from benchmarks.harness import Bench, Options, WrongResultError
from benchmarks.result import Result, at_least, at_most, read_result, write_result
from benchmarks.timing import Clocks, Contender
from vqscale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class Time:
    """A clock that only work moves on; `seconds` says how long a contender's laps take."""

    def __init__(self, **seconds: list[float]) -> None:
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.wall = self.cpu = 100.0
        self.said: list[str] = []

    def contender(self, name: str, done: float = 1.0) -> Contender:
        def work() -> float:
            took = next(self.seconds[name])
            self.wall, self.cpu = self.wall + took, self.cpu + 2 * took
            self.said.append(name)
            return done

        def aside(what: str) -> Callable[[], None]:
            def take() -> None:
                self.wall, self.cpu = self.wall + 50, self.cpu + 50
                self.said.append(what)

            return take

        return Contender(name, work, aside(f"before {name}"), aside(f"after {name}"))

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.wall, lambda: self.cpu, lambda: self.said.append("rest"))

    def turns(self) -> list[str]:
        return [name for name in self.said if name in self.seconds]


def test_contenders_take_turns_and_only_their_work_is_timed() -> None:
    made_up = Time(a=[1, 2, 4], b=[3, 3, 3])
    race = timing.race([made_up.contender("a", 8), made_up.contender("b", 6)], 3, warm_up_s=0, clocks=made_up.clocks())
    assert made_up.turns() == ["a", "b", "a", "b", "a", "b"]
    assert made_up.said[:8] == ["before a", "a", "after a", "rest", "before b", "b", "after b", "rest"]
    assert race.seconds("a") == [1, 2, 4]
    assert race.rates("a") == [8, 4, 2]
    assert race.cpu_rates("a") == [4, 2, 1]
    assert race.rates("b") == [2, 2, 2]


def test_warm_up_is_by_time() -> None:
    made_up = Time(short=[0.75] * 9, long=[5.0] * 9)
    contenders = [made_up.contender("short"), made_up.contender("long")]
    steps: list[tuple[int, int]] = []
    race = timing.race(contenders, 2, clocks=made_up.clocks(), report=lambda *step: steps.append(step))
    assert made_up.turns() == ["short"] * 3 + ["long"] + ["short", "long"] * 2
    assert len(race.laps["short"]) == len(race.laps["long"]) == 2
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_figure_has_median_and_percentiles() -> None:
    found = stats.figure([10, 0, 5, 20, 15], "images/s")
    assert (found.median, found.p10, found.p90, found.n, found.unit) == (10, 2, 18, 5, "images/s")


def test_ratio_is_taken_within_rounds() -> None:
    """A machine that is slow for a round slows both sides: the ratio stays, the ratio of medians would not."""
    over, under = [20.0, 200.0, 40.0], [10.0, 100.0, 20.0]
    assert stats.ratio(over, under) == (2.0, (2.0, 2.0))
    over = [10.0, 2.0, 3.0, 100.0, 5.0]
    under = [5.0, 2.0, 1.0, 20.0, 1.25]
    middle, (low, high) = stats.ratio(over, under)
    assert middle == 3.0  # of 2, 1, 3, 5, 4
    assert 1 <= low < 3 < high <= 5
    assert stats.ratio(over, under) == (middle, (low, high)), "the bootstrap's seed is fixed"
    with pytest.raises(ValueError, match="not of the same rounds"):
        stats.ratio([1.0], [1.0, 2.0])


def test_interval_covers_the_middle_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        _, (low, high) = stats.ratio(rng.normal(3, 0.3, 15).tolist(), [1.0] * 15)
        inside += low <= 3 <= high
    assert 88 <= inside <= 100


def test_cpu_seconds_hold_children_that_live_and_that_have_ended() -> None:
    spin = (
        "import time, sys\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\nprint(flush=True)\n"
    )
    before = timing.cpu_seconds()
    child = subprocess.Popen(
        [sys.executable, "-c", f"{spin}sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        living = timing.cpu_seconds() - before
    finally:
        child.communicate()
    ended = timing.cpu_seconds() - before
    assert living >= 0.2
    assert ended >= living


def test_rest_waits_until_nobody_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others work at half a core, then at a hundredth; looking itself costs this thread five milliseconds each time."""
    wall, looked = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal wall
        wall += seconds

    def look() -> float:
        nonlocal looked
        looked += 1
        return 5e-3 * looked + (wall / 2 if wall <= busy_until else busy_until / 2 + (wall - busy_until) / 100)

    monkeypatch.setattr(timing.time, "sleep", sleep)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: wall)
    monkeypatch.setattr(timing.time, "thread_time", lambda: 5e-3 * looked)
    monkeypatch.setattr(timing, "cpu_seconds", look)
    busy_until = 0.5
    timing.rest()
    assert 0.5 < wall < 0.6
    busy_until = 1_000.0
    with pytest.raises(RuntimeError, match="still works"):
        timing.rest()


def test_load_above_the_cores_is_flagged() -> None:
    assert not machine.load((1.9, 9, 9), (2.0, 9, 9), cores=2, others=0.004).above_cores
    assert machine.load((2.1, 0, 0), (0, 0, 0), cores=2, others=0).above_cores
    assert machine.load((0, 0, 0), (2.1, 0, 0), cores=2, others=0).above_cores


def test_machine_and_commit_are_known(tmp_path: Path) -> None:
    found = machine.machine()
    assert found.cpu
    assert found.cores == len(os.sched_getaffinity(0))
    assert set(found.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert machine._slug("Xeon(R)", ["avx2", "avx512f"], 2, []) == "xeon-r-avx512f-2-cores"
    assert machine._slug("EPYC", [], 4, ["H200", "H200"]) == "epyc-4-cores-2-h200"
    assert {"python", "numpy"} <= set(machine.versions(["no-such-package"]))
    assert "no-such-package" not in machine.versions(["no-such-package"])

    def git(*words: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert machine.commit(tmp_path).id is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = machine.commit(tmp_path)
    assert clean.id is not None
    assert len(clean.id) == 40
    assert not clean.dirty
    (tmp_path / "file").write_text("2")
    assert machine.commit(tmp_path).dirty


def made_up_benchmark(bench: Bench) -> None:
    """Ours takes 1 s, the peer 3 s, in every round; another peer is not installed."""
    made_up = Time(ours=[1.0] * 99, peer=[3.0] * 99)
    bench.clocks = made_up.clocks()
    bench.config["batch"] = 4
    bench.check("peer_pixels", "mean difference", 0.5, 1.0)
    bench.skip("absent", "cannot be imported")
    race = bench.race("work", [made_up.contender("ours", 12), made_up.contender("peer", 12)])
    for name in ("ours", "peer"):
        bench.figure(name, race.rates(name), "images/s")
    bench.floor("limit", [16.0] * len(race.rates("ours")), "images/s", "so many at most")
    bench.ratio("vs_peer", race.rates("ours"), race.rates("peer"))
    bench.ratio("share", race.seconds("ours"), race.seconds("peer"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the made-up benchmark the only one, called `made-up`."""
    goals = {"vs_peer": at_least(2.5), "share": at_most(0.3), "unmeasured": at_least(1)}
    module = SimpleNamespace(GOALS=goals, PACKAGES=("pillow",), run=made_up_benchmark)
    monkeypatch.setitem(sys.modules, "made_up_benchmark", module)  # type: ignore[arg-type]
    monkeypatch.setattr(registry, "BENCHMARKS", {"made-up": registry.Entry("made_up_benchmark", "nothing real")})


def measured(**changes: Any) -> Result:
    """The made-up benchmark's result, with other values where some are given."""
    bench = Bench("made-up", Path("unused"), Options(), {"vs_peer": at_least(2.5), "share": at_most(0.3)})
    made_up_benchmark(bench)
    return bench.finish().model_copy(update=changes)


def test_result_has_everything_that_it_is_judged_by(benchmark: None, tmp_path: Path) -> None:
    assert command.main(["made-up", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "made-up.json").read_text())
    assert {"name", "machine", "versions", "config", "figures", "floors", "ratios"} <= set(found)
    assert found["figures"]["ours"] == {"median": 12.0, "p10": 12.0, "p90": 12.0, "n": 7, "unit": "images/s"}
    assert found["floors"]["limit"]["formula"] == "so many at most"
    assert found["ratios"]["vs_peer"] == pytest.approx(3)
    assert found["intervals"]["vs_peer"] == pytest.approx([3, 3])
    assert found["goals"] == {
        "vs_peer": {"limit": 2.5, "bound": "at least"},
        "share": {"limit": 0.3, "bound": "at most"},
    }
    assert found["skipped"] == {"absent": "cannot be imported"}
    assert found["correctness"]["peer_pixels"] == {"what": "mean difference", "value": 0.5, "limit": 1.0}
    assert found["config"] == {"quick": False, "batch": 4}
    assert found["rounds"]["ours"] == [12.0] * 7
    assert "pillow" in found["versions"]
    assert set(found["load"]) == {"before", "after", "above_cores", "others"}
    assert set(found["commit"]) == {"id", "dirty"}


def test_table_shows_goals_and_what_was_skipped(
    benchmark: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path)]) == 0, "all benchmarks where none is named"
    printed = capsys.readouterr()
    lines = {line.split()[0]: " ".join(line.split()) for line in printed.out.splitlines() if line}
    assert lines["ours"] == "ours 12.00 12.00 – 12.00 images/s"
    assert lines["vs_peer"] == "vs_peer 3.00 3.00 – 3.00 at least 2.5: met"
    assert lines["share"] == "share 0.333 0.333 – 0.333 at most 0.3: missed"
    assert lines["limit"] == "limit 16.00 16.00 – 16.00 images/s"
    assert "note: skipped absent: cannot be imported" in printed.out
    assert "made-up: work: 7 of 7" in printed.err


def test_quick_is_marked_and_has_no_verdicts(
    benchmark: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["made-up", "--quick", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "made-up.json").read_text())
    assert printed["config"]["quick"]
    assert printed["figures"]["ours"]["n"] < 7
    result = read_result(tmp_path / "made-up.json")
    assert report.goal(result, "vs_peer") == "at least 2.5"
    assert any("quick" in line for line in report.remarks(result))


def test_all_leaves_results_pictures_and_a_page(
    benchmark: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["all", "--quick", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"made-up.json", "made-up.png", "benchmarks.md"}
    page = (tmp_path / "benchmarks.md").read_text()
    assert "(made-up.png)" in page
    assert "| `vs_peer` | 3.00 |" in page
    said = capsys.readouterr().err
    assert f"all of it: {tmp_path / 'benchmarks.md'}" in said
    assert "next: vqscale bench all  # without --quick" in said


def test_without_matplotlib_there_are_no_pictures_and_it_says_so(
    benchmark: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command.main(["--out", str(tmp_path)]) == 0
    assert "no plots: matplotlib is not installed: pip install" in capsys.readouterr().err
    assert "(made-up.png)" not in (tmp_path / "benchmarks.md").read_text()
    assert not (tmp_path / "made-up.png").exists()
    document = tmp_path / "page.md"
    document.write_text("<!-- results: begin -->\n<!-- results: end -->\n")
    assert command.main(["--render", str(document)]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert "###" not in document.read_text(), "no page that speaks of pictures which there are not"


def test_one_wrong_result_does_not_cost_the_others(
    benchmark: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(bench: Bench) -> None:
        bench.check("pixels", "difference", 2.0, 1.0)

    monkeypatch.setitem(sys.modules, "wrong_one", SimpleNamespace(GOALS={}, PACKAGES=(), run=wrong))  # type: ignore[arg-type]
    killed = SimpleNamespace(GOALS={}, PACKAGES=(), run=lambda _: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setitem(sys.modules, "killed_one", killed)  # type: ignore[arg-type]
    others = {name: registry.Entry(f"{name}_one", "") for name in ("wrong", "killed")}
    monkeypatch.setattr(registry, "BENCHMARKS", others | registry.BENCHMARKS)
    assert command.main(["--out", str(tmp_path)]) == 1
    assert (tmp_path / "made-up.json").exists()
    said = capsys.readouterr().err
    assert "error: killed: its process was killed; is there too little memory?" in said
    assert "no results, nothing written: wrong, killed" in said


def test_a_terminal_gets_bars(
    benchmark: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert command.main(["made-up", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().err
    assert "made-up: work" in shown
    assert "7/7" in shown


def test_a_contender_that_fails_is_closed() -> None:
    made_up = Time(a=[])
    with pytest.raises(StopIteration):
        timing.race([made_up.contender("a")], 1, warm_up_s=0, clocks=made_up.clocks())
    assert made_up.said == ["before a", "after a"]


def test_wrong_results_are_not_timed(
    benchmark: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(bench: Bench) -> None:
        bench.check("peer_pixels", "mean difference", float("nan"), 1.0)

    monkeypatch.setattr(sys.modules["made_up_benchmark"], "run", wrong)
    assert command.main(["made-up", "--out", str(tmp_path)]) == 1
    assert "error: made-up: peer_pixels: mean difference: nan, at most 1" in capsys.readouterr().err
    assert not (tmp_path / "made-up.json").exists()
    with pytest.raises(WrongResultError):
        Bench("x", tmp_path).check("k", "w", 1.5, 1.0)


def test_schema_refuses_unknown_keys(tmp_path: Path) -> None:
    path = write_result(tmp_path, measured())
    assert read_result(path) == measured(**dict(read_result(path))), "reads what it has written"
    for keys in ([], ["machine"], ["figures", "ours"], ["load"]):
        content = json.loads(path.read_text())
        place = content
        for key in keys:
            place = place[key]
        place["surplus"] = 1
        other = tmp_path / "other.json"
        other.write_text(json.dumps(content))
        with pytest.raises(
            UserError, match=rf"other\.json: is no result of this version \({'.'.join([*keys, 'surplus'])}"
        ):
            read_result(other)
    with pytest.raises(UserError, match="cannot be read"):
        read_result(tmp_path / "absent.json")


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert {"name", "machine", "versions", "config", "figures", "floors", "ratios"} <= set(schema["required"])


def compare(tmp_path: Path, one: Result, other: Result, *words: str) -> int:
    paths = [write_result(tmp_path / name, result) for name, result in (("one", one), ("other", other))]
    return command.main(["--compare", *map(str, paths), *words])


def test_comparison_stands_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = measured()
    changed = {
        "ratios": {"vs_peer": 3.3, "new": 1.0},
        "intervals": {"vs_peer": (3.2, 3.4), "new": (1.0, 1.0)},
        "config": {"quick": False, "batch": 8},
    }
    assert compare(tmp_path, one, measured(**changed)) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: " ".join(line.split()) for line in printed.splitlines() if line}
    assert lines["vs_peer"] == "vs_peer 3.00 3.00 – 3.00 3.30 3.20 – 3.40 +10.0 % *"
    assert "note: only one of them has new" in printed
    assert "note: only one of them has share" in printed
    assert "note: batch differs: 4, 8" in printed


def test_different_machines_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = measured()
    elsewhere = measured(machine=one.machine.model_copy(update={"cores": one.machine.cores + 1, "name": "larger"}))
    assert compare(tmp_path, one, elsewhere) == 2
    line = capsys.readouterr().err
    assert "different machines" in line
    assert "--force" in line
    assert compare(tmp_path, one, elsewhere, "--force") == 0
    assert "note: the machines differ" in capsys.readouterr().out
    assert compare(tmp_path, one, measured(name="another"), "--force") == 2


def test_unknown_names_are_one_line(home: Path) -> None:
    """From any directory, through the command line of `vqscale`."""
    for words, expected in (
        (["lodaer"], "unknown benchmark 'lodaer'; did you mean 'loader'? benchmarks: "),
        (["loader", "--qiuck"], "unknown option '--qiuck'; did you mean '--quick'?"),
        (["loader", "--data", "nothing.tar", "--quick"], "nothing.tar"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "bench", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1


def test_every_benchmark_is_listed_and_has_goals_for_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(registry.BENCHMARKS)
    for name in registry.BENCHMARKS:
        module = registry.load(name)
        assert callable(module.run)
        assert all(goal.limit > 0 for goal in module.GOALS.values())


def test_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    result = measured()
    write_result(tmp_path / "results", result)
    render.render(document, tmp_path / "results")
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert f"### made-up, {result.machine.name}" in text
    assert "| `vs_peer` | 3.00 | 3.00 – 3.00 | at least 2.5: met |" in text
    assert "| `limit` | 16.00 | 16.00 – 16.00 | images/s | so many at most |" in text
    assert "- skipped absent: cannot be imported" in text
    with Image.open(tmp_path / render.IMAGES / "made-up.png") as picture:
        assert picture.info[plots.SOURCE] == plots.fingerprint(result)
        assert picture.width > 500
    assert render.rendered(text, tmp_path / "results") == text
    with pytest.raises(UserError, match="no place for results"):
        render.rendered("nothing", tmp_path / "results")


def test_document_shows_the_results_that_are_kept() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert render.rendered(text) == text, "run `python -m benchmarks --render docs/benchmarks.md`"
    pictures = ROOT / "docs" / render.IMAGES
    assert {path.stem for path in pictures.iterdir()} == {path.stem for path in render.RESULTS.glob("*.json")}
    for path in render.RESULTS.glob("*.json"):
        result = read_result(path)
        with Image.open(pictures / f"{path.stem}.png") as picture:
            assert picture.info[plots.SOURCE] == plots.fingerprint(result), "an old picture"
        assert path.name == f"{result.name}-{result.machine.name}.json"
        assert not result.config["quick"], "a quick run's figures say nothing"


def test_the_example_of_the_document_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/benchmarks.md", "exec"), names)
    bench = Bench("shuffle", tmp_path, Options(quick=True), names["GOALS"], names["PACKAGES"])
    names["run"](bench)
    assert set(bench.finish().ratios) == set(names["GOALS"])
