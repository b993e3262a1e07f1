"""`vqscale bench --compare`: a slowdown of 20 % in any of ours is flagged, and what is no slowdown is not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import compare, registry, render
from benchmarks.harness import Bench, Options
from benchmarks.result import Result, at_least, at_most, read_result, write_result
from benchmarks.timing import Clocks, Contender

SLOW = 1.2


def spinning(seconds: float) -> Callable[[], float]:
    """So many CPU seconds of this thread, whatever else the machine does."""

    def work() -> float:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return 1.0

    return work


def measure(folder: Path, factor: float = 1.0) -> Result:
    """A race of real work on real clocks: ours, planted or not, and two peers."""
    # The clock of this process alone: looking for its children costs as much as these laps.
    clocks = Clocks(cpu=time.process_time, rest=lambda: None)
    goals = {"vs_plain_peer": at_least(1)}
    bench = Bench("tokenizer", folder, Options(quick=True, rounds=9), goals, clocks=clocks)
    ours = Contender("ours", spinning(0.01 * factor))
    race = bench.race("steps", [ours, Contender("plain", spinning(0.012)), Contender("other", spinning(0.008))])
    bench.ratio("vs_plain_peer", race.cpu_rates("ours"), race.cpu_rates("plain"))
    return bench.finish()


def run(tmp_path: Path, one: Result, other: Result, *words: str) -> int:
    paths = [write_result(tmp_path / name, result) for name, result in (("one", one), ("other", other))]
    return command.main(["--compare", *map(str, paths), *words])


def test_a_slowdown_is_flagged_on_real_clocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = measure(tmp_path)
    assert run(tmp_path, before, measure(tmp_path, SLOW)) == 1
    printed = capsys.readouterr().out
    assert "slower by more than 10%: tokenizer: vs_plain_peer" in printed
    assert "slower by more than 10%: tokenizer: steps: ours, CPU time" in printed
    assert "next: measure both again" in printed
    again = [change for change in compare.changes(before, measure(tmp_path)) if "wall" not in change.what]
    assert not [change for change in again if change.verdict(0.1).startswith("SLOWER")], "CPU seconds of the same work"
    faster = compare.changes(before, measure(tmp_path, 1 / SLOW / SLOW))
    assert [change.verdict(0.1) for change in faster if "CPU" in change.what] == ["faster"]


def lapped(rates: dict[str, float], spread: float, seed: int) -> dict[str, Any]:
    """Laps of made-up contenders: each round has a pace of its own, and each lap some noise."""
    rng = np.random.default_rng(seed)
    paces = np.exp(rng.normal(0, 0.3, 7))
    laps = {}
    for who, rate in rates.items():
        seconds = paces / rate * np.exp(rng.normal(0, spread, 7))
        laps[who] = tuple((1.0, float(wall), float(2 * wall)) for wall in seconds)
    return {"work": laps}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Some result, whose ratios and laps are then others."""
    return measure(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", registry.BENCHMARKS)
def test_any_of_ours_in_any_benchmark_is_flagged(name: str, plain: Result) -> None:
    """20 % off one contender's rate in noise of 3 % a lap, while the machine is slower by a half."""
    ours = [pattern.replace("*", "") for pattern in registry.BENCHMARKS[name].ours]
    rates = {who: 1.0 + number for number, who in enumerate(ours)} | {"peer": 2.0, "floor": 9.0, "pace": 4.0}
    before = plain.model_copy(update={"name": name, "races": lapped(rates, 0.03, 0)})
    for slow in ours:
        now = {who: rate / (1.5 * SLOW if who == slow else 1.5) for who, rate in rates.items()}
        after = before.model_copy(update={"races": lapped(now, 0.03, 1)})
        found = compare.flagged({name: compare.changes(before, after)}, compare.TOLERANCE)
        assert found == [f"{name}: work: {slow}, {clock} time" for clock in ("wall", "CPU")]
    same = before.model_copy(update={"races": lapped({who: rate / 1.5 for who, rate in rates.items()}, 0.03, 2)})
    assert compare.flagged({name: compare.changes(before, same)}, compare.TOLERANCE) == []


def test_a_peer_in_another_version_is_not_ours(plain: Result) -> None:
    rates = {"ours": 1.0, "peer": 2.0, "floor": 9.0, "pace": 4.0}
    before = plain.model_copy(update={"races": lapped(rates, 0.02, 0)})
    after = plain.model_copy(update={"races": lapped({**rates, "peer": 3.0}, 0.02, 1)})
    assert compare.flagged({"x": compare.changes(before, after)}, 0.1) == []


@pytest.mark.parametrize("path", sorted(render.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_ratio_of_every_kept_result_is_flagged(path: Path, tmp_path: Path) -> None:
    """Also where the intervals are wide, and where small is good."""
    result = read_result(path)
    for key, value in result.ratios.items():
        worse = value * SLOW if compare.smaller_is_better(result, key) else value / SLOW
        after = result.model_copy(update={"ratios": {**result.ratios, key: worse}})
        assert compare.flagged({result.name: compare.changes(result, after)}, compare.TOLERANCE) == [
            f"{result.name}: {key}"
        ]
    assert run(tmp_path, result, result) == 0


def test_direction_and_doubt_are_said(plain: Result) -> None:
    goals = {"stall": at_most(0.1), "speed": at_least(2)}

    def result(stall: float, speed: float, width: float) -> Result:
        ratios = {"stall": stall, "speed": speed, "sync_share_of_step": stall}
        intervals = {key: (value - width, value + width) for key, value in ratios.items()}
        return plain.model_copy(update={"ratios": ratios, "intervals": intervals, "goals": goals, "races": {}})

    def verdicts(one: Result, other: Result) -> list[str]:
        return [change.verdict(0.1) for change in compare.changes(one, other)]

    assert verdicts(result(0.1, 3, 0.001), result(0.13, 3.6, 0.001)) == ["SLOWER", "faster", "SLOWER"]
    assert verdicts(result(0.1, 3, 1), result(0.13, 2.4, 1)) == ["SLOWER?"] * 3
    assert verdicts(result(0.1, 3, 0.001), result(0.105, 2.9, 0.001)) == ["", "", ""]


def test_folders_are_compared_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: Result) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    slow = plain.model_copy(
        update={"ratios": {"vs_plain_peer": plain.ratios["vs_plain_peer"] / SLOW}, "name": "loader"}
    )
    for folder in (one, other):
        write_result(folder, plain)
    write_result(one, plain.model_copy(update={"name": "loader"}))
    write_result(one, plain.model_copy(update={"name": "prior"}))
    write_result(other, slow)
    assert command.main(["--compare", str(one), str(other)]) == 1
    printed = capsys.readouterr().out
    assert "slower by more than 10%: loader: vs_plain_peer" in printed
    assert "tokenizer: vs_plain_peer" not in printed
    assert "note: only one of the folders has prior.json" in printed
    assert command.main(["--compare", str(one), str(other), "--tolerance", "30"]) == 0
    capsys.readouterr()
    for words, fault in (
        ([one, other / "loader.json"], "are a folder and a file"),
        ([one, tmp_path / "nothing"], "are a folder and a file"),
        ([one, tmp_path], "have no result of the same name"),
    ):
        assert command.main(["--compare", *map(str, words)]) == 2
        assert fault in capsys.readouterr().err
    for option in (["--tolerance", "0"], ["--tolerance", "x"], ["--rounds", "0"]):
        assert command.main(["--list", *option]) == 2
        assert option[0] in capsys.readouterr().err


def test_results_from_before_there_were_laps_are_read(plain: Result, tmp_path: Path) -> None:
    content = json.loads(plain.model_dump_json())
    del content["races"], content["prediction"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(content))
    old = read_result(path)
    assert [change.what for change in compare.changes(old, plain)] == ["vs_plain_peer"]
