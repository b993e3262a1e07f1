"""What all tests share: homes of their own, and no rank variables from outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANK_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "PET_", "SLURM_", "SBATCH_", "VQSCALE_")


@pytest.fixture(autouse=True)
def _no_rank_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that runs under torchrun, or inside a stage, must not take itself for a rank of it."""
    for name in list(os.environ):
        if name in _RANK_VARIABLES or name.startswith(_RANK_PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture
def home(_no_rank_variables: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs and their index below the test's own folder."""
    monkeypatch.setenv("VQSCALE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VQSCALE_RUNS", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture
def idle_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that answers and knows no jobs; what becomes of `sbatch` is the test's own."""
    from launcher.backends import slurm_queue

    monkeypatch.setattr(slurm_queue, "jobs", lambda fresh=False: {})
    monkeypatch.setattr(slurm_queue, "release", lambda job: None)


@pytest.fixture
def fakes(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of PATH for stand-ins of Slurm's commands; its `scontrol` writes down what it is asked."""
    from launcher.backends import slurm_queue
    from tests.slurm_stand_ins import stand_in

    folder = home / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    slurm_queue._forget()
    stand_in(folder, "scontrol", 'echo "$@" >> "$(dirname "$0")/asked"')
    return folder
