"""Who watches over a training loop: requests to stop, signs of life, and each rank's pace."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ranks import LIMIT_S, run_ranks
from vqscale.training import pace as pace_module
from vqscale.training import watchdog
from vqscale.training.pace import Pace
from vqscale.training.preemption import Notice
from vqscale.training.vigil import Vigil
from vqscale.training.watchdog import Watchdog, find_hang


def _never() -> None:
    raise AssertionError("nothing hangs")


def _agree(world: int) -> list[Any]:
    from vqscale.training.distributed import process_group
    from vqscale.training.preemption import preemption

    before = signal.getsignal(signal.SIGUSR2)
    with process_group("cpu") as ranks:
        with preemption() as notice:
            heard = []
            for step in range(6):
                notice.begin()
                if step == 2 and ranks.rank == world - 1:
                    os.kill(os.getpid(), signal.SIGUSR2)
                    os.kill(os.getpid(), signal.SIGTERM)
                heard.append(notice.agreed())
                if heard[-1]:
                    break
        restored = signal.getsignal(signal.SIGUSR2) == before
    return [heard, restored, notice.received and notice.received.name]


@pytest.mark.dist
def test_ranks_agree_on_the_step_at_which_they_stop() -> None:
    first, last = run_ranks(2, _agree, 2)
    # The signal came when the others had begun to ask for step 2: it is heard with step 3, by all.
    assert first == [["", "", "", "SIGUSR2"], True, None]
    assert last == [["", "", "", "SIGUSR2"], True, "SIGUSR2"]


def test_a_silent_rank_leaves_stacks_and_a_note(tmp_path: Path) -> None:
    ended = threading.Event()
    with Watchdog(tmp_path, rank=1, limit_s=0.2, end=ended.set) as watchdog:
        watchdog.beat("own part", 6)
        watchdog.beat("collective", 7)
        assert ended.wait(LIMIT_S)
    note = json.loads((tmp_path / "hang/rank-00001.json").read_text())
    assert (note["rank"], note["step"], note["doing"]) == (1, 7, "collective")
    assert note["silent_s"] >= 0.2
    assert "test_a_silent_rank" in (tmp_path / "hang/stacks-00001.txt").read_text()
    json.loads((tmp_path / "hang/flight-00001.json").read_bytes())


def test_all_ranks_dump_when_one_is_over_time(tmp_path: Path) -> None:
    ended = [threading.Event(), threading.Event()]
    with (
        Watchdog(tmp_path, 0, limit_s=50, end=ended[0].set),
        Watchdog(tmp_path, 1, limit_s=0.2, end=ended[1].set),
    ):
        assert all(event.wait(LIMIT_S) for event in ended)
    assert sorted(path.name for path in (tmp_path / "hang").glob("rank-*")) == ["rank-00000.json", "rank-00001.json"]


def test_a_rank_seldom_asks_the_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ten minutes of training, on a clock of the test: a hundred times, and not when the other ranks do."""
    clock, looked = [0.0], dict[int, list[float]]()

    def wait(seconds: float) -> bool:
        clock[0] += seconds
        watched.beat("own part", int(clock[0]))
        return clock[0] > 600

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for rank in (0, 4, 8, 12):
        clock[0], seen = 0.0, looked.setdefault(rank, [])
        watched = Watchdog(tmp_path, rank, limit_s=300, end=_never)
        monkeypatch.setattr(watched, "_over", SimpleNamespace(wait=wait))
        monkeypatch.setattr(watched, "_noted", lambda seen=seen: bool(seen.append(clock[0])))
        watched._look()
    assert all(90 <= len(times) <= 100 for times in looked.values())
    assert len({times[5] for times in looked.values()}) == 4


def test_the_start_may_take_four_times_as_long(tmp_path: Path) -> None:
    ended = threading.Event()
    with Watchdog(tmp_path, 0, limit_s=0.3, end=ended.set) as watchdog:
        watchdog.beat("own part", 20)
        assert ended.wait(LIMIT_S)
    note = json.loads((tmp_path / "hang/rank-00000.json").read_text())
    assert note["silent_s"] >= 1.2


def test_signs_of_life_keep_the_watchdog_quiet(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, limit_s=3600, end=_never) as watchdog:
        watchdog.beat("own part", 1)
    assert not (tmp_path / "hang").exists()


def test_a_sign_in_the_midst_of_something_keeps_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the batches of a validation give one each; what then hangs is still the validation. On a clock of the test."""
    clock, ended, looks = [0.0], list[float](), iter(range(10))

    def wait(seconds: float) -> bool:
        """Between two looks, whatever they are apart, a second goes by; only the first five see a sign."""
        clock[0] += 1
        if next(looks) < 5:
            watched.alive()
        return False

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0], time=time.time))
    watched = Watchdog(tmp_path, 0, limit_s=2, end=lambda: ended.append(clock[0]))
    monkeypatch.setattr(watched, "_over", SimpleNamespace(wait=wait))
    watched._began = time.time()
    watched.beat("own part", 1)
    watched.beat("validation", 2)
    watched._look()
    assert ended == [9.0], "five with a sign, three until it is too long, one in which others may dump"
    note = json.loads((tmp_path / "hang/rank-00000.json").read_text())
    assert (note["doing"], note["step"]) == ("validation", 2)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([(9, "collective"), (9, "own part"), (9, "collective")], "rank 1 on here hangs, step 9 (own part)"),
        ([(9, "own part"), (9, "own part"), (8, "collective")], "rank 2 on here hangs, step 8 (collective)"),
        ([(9, "collective"), None, (9, "collective")], "rank 1 hangs and cannot leave a note, step 9 (collective)"),
    ],
)
def test_the_rank_that_all_wait_for_is_named(ranks: list[tuple[int, str] | None], said: str, tmp_path: Path) -> None:
    (tmp_path / "hang").mkdir()
    for rank, what in enumerate(ranks):
        if what:
            note = {"rank": rank, "host": "here", "step": what[0], "doing": what[1], "silent_s": 5.0}
            (tmp_path / f"hang/rank-{rank:05d}.json").write_text(json.dumps(note))
    assert find_hang(tmp_path, 3)[1].startswith(f"{said}, no sign of life for 5 s; stacks in")


def test_a_slow_rank_is_named_once_it_was_slow_twice() -> None:
    pace = Pace(["a", "b", "c"])
    assert pace.judge([10.0, 10.0, 30.0], steps=1) == ({}, ""), "the first step starts everything up"
    figures, warning = pace.judge([10.0, 10.0, 30.0], steps=10)
    assert figures == {"speed/slowest_rank": 2.0, "speed/slowest_over_median": 3.0}
    assert not warning
    assert "rank 2 on c takes 3 s for its own part of a step, 3.0 times" in pace.judge([10.0, 10.0, 30.0], 10)[1]
    assert not pace.judge([10.0, 10.0, 30.0], 10)[1], "said once"
    assert not pace.judge([10.0, 10.0, 11.0], 10)[1]
    assert not pace.judge([10.0, 30.0, 10.0], 10)[1]
    assert not pace.judge([10.0, 10.0, 30.0], 10)[1], "another rank: counted anew"


def test_one_of_two_ranks_can_be_slow() -> None:
    pace = Pace(["a", "b"])
    assert pace.judge([1.0, 4.0], 2)[0]["speed/slowest_over_median"] == 4.0
    assert Pace(["alone"]).judge([1.0], 2) == ({}, "")


def test_pace_counts_own_work_and_waiting_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([7.0, 7.5])
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    pace = Pace(["a", "b"])
    pace.begin()
    pace.meet()
    own = pace.own(rank=1, waited_for_data=2.0)
    assert own[0] == 0.0
    assert own[1] == 2.5
    assert pace.own(1, 0.0) == [0.0, 0.0], "the next window begins"


def test_a_save_longer_than_half_the_lead_is_warned_of_once(tmp_path: Path) -> None:
    watching = Vigil(Notice.__new__(Notice), Watchdog(tmp_path, 0, 60.0, _never), Pace(["a"]), lead_s=30.0)
    assert not watching.too_slow(15.0)
    assert "a save takes 16.0 s, more than half of the 30 s" in watching.too_slow(16.0)
    assert not watching.too_slow(17.0)
    unknown = Vigil(Notice.__new__(Notice), Watchdog(tmp_path, 0, 60.0, _never), Pace(["a"]))
    assert not unknown.too_slow(1e6), "nobody said how long there is"
