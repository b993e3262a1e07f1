"""The promise of the README: from nothing to sampled clocks. How long it takes is measured on idle machines."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqscale.config.layout import RunLayout
from vqscale.files import read_json

HOUSE = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(3600)
def test_quickstart(tmp_path: Path) -> None:
    environment = os.environ | {"VQSCALE_HOME": str(tmp_path / "home"), "VQSCALE_RUNS": str(tmp_path / "runs")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "quickstart", "--run", str(tmp_path / "run")],
        cwd=HOUSE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    layout = RunLayout(tmp_path / "run")
    report = read_json(layout.report)
    print(f"{seconds:.0f} s", report)
    assert report["hour_accuracy"] >= 0.90
    assert report["usage_top"] >= 0.90
    assert report["usage_bottom"] >= 0.90
    assert report["psnr"] >= 23
    assert report["samples_per_hour"] >= 48
    assert set(report["seconds"]) == set(layout.read_recipe().stages)
    for text in (str(layout.samples / "sheet.png"), "tensorboard --logdir", "hour_accuracy"):
        assert text in done.stdout
