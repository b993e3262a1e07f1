"""The benchmark `codes`: it compares what it says, and it runs; what it measures is never asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import codes, codes_read
from benchmarks.harness import Bench, Options, WrongResultError
from vqscale.data.manifest import CodeLevel
from vqscale.loading import TrainedTokenizer

LEVELS = [CodeLevel(name="bottom", grid=4, codes=512), CodeLevel(name="top", grid=2, codes=512)]
CODES = {
    level.name: np.random.default_rng(0).integers(0, 512, (20, level.grid, level.grid), dtype=np.uint16)
    for level in LEVELS
}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("codes", tmp_path, Options(quick=True), codes.GOALS, codes.PACKAGES)


def test_it_runs(bench: Bench) -> None:
    codes.run(bench)
    found = bench.finish()
    assert set(found.goals) == {"bytes_vs_uint16", "read_vs_npy", "extract_fraction_of_limit"}
    assert set(found.ratios) - set(found.goals) == ({"read_vs_litdata"} if "litdata" not in found.skipped else set())
    assert "read_samples_per_s_core" in found.figures
    assert {"extract_limit"} == set(found.floors)
    assert found.correctness["extract_codes"].value == found.correctness["ours_codes"].value == 0


def test_no_two_samples_are_equal() -> None:
    found = codes_read.multiplied(CODES, 70)
    assert found["bottom"].shape == (70, 4, 4)
    assert len(np.unique(found["bottom"].reshape(70, -1), axis=0)) == 70
    assert np.array_equal(found["bottom"][:20], CODES["bottom"])


def test_reading_something_else_stops_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied = codes_read.multiplied(CODES, codes_read.SHARDS * codes_read.QUICK)
    monkeypatch.setattr(codes_read, "multiplied", lambda *_: multiplied)
    read = codes_read.shuffled

    def wrong(*arguments: object) -> object:
        for batch in read(*arguments):  # type: ignore[arg-type]
            batch["top"][0, 0, 0] ^= 1
            yield batch

    monkeypatch.setattr(codes_read, "shuffled", wrong)
    with pytest.raises(WrongResultError, match="codes that differ from those that were written"):
        codes_read.measure(bench, LEVELS, CODES)


def test_extracting_something_else_stops_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = TrainedTokenizer.encode, 0

    def unlike(tokenizer: TrainedTokenizer, images: np.ndarray) -> dict[str, np.ndarray]:
        nonlocal calls
        calls += 1
        found = encode(tokenizer, images)
        return {name: (grid + calls) % 512 for name, grid in found.items()}

    monkeypatch.setattr(TrainedTokenizer, "encode", unlike)
    with pytest.raises(WrongResultError, match="differ from the tokenizer's"):
        codes.run(bench)
