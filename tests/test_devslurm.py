"""Files of the throw-away Slurm, and what `vqscale cluster` says; starts nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import devslurm
from cluster.devslurm import DevSlurm
from launcher.cli import main


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devslurm, "missing", list)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path that sockets can have, wherever the tests' own folders lie."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_missing_packages_are_named_with_the_line_that_installs_them(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devslurm, "missing", lambda: ["munged", "slurmctld"])
    assert main(["cluster", "up"]) == 2
    told = capsys.readouterr().err
    assert "munged, slurmctld not installed; apt-get install -y --no-install-recommends slurm-wlm munge" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", ["a b", "x" * 70, "a'b", "a#b"])
def test_directories_that_slurm_cannot_use_are_refused(
    home: Path, installed: None, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "up", "--dir", str(home / name)]) == 2
    assert "choose a short --dir" in capsys.readouterr().err
    assert not (home / name).exists()


def test_a_directory_of_other_files_is_left_alone(
    home: Path, short: Path, installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (short / "d/state").mkdir(parents=True)
    (short / "d/state/thesis.tex").write_text("mine")
    assert main(["cluster", "up", "--dir", str(short / "d")]) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    assert (short / "d/state/thesis.tex").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device files")
def test_everything_lies_below_the_directory(installed: None, short: Path) -> None:
    made = devslurm.prepare(short / "d", 2)
    settings = dict(
        line.split("=", 1) for line in made.conf.read_text().splitlines() if "=" in line and not line.startswith("#")
    )
    places = [value for name, value in settings.items() if value.startswith("/") and name != "MailProg"]
    assert len(places) == 6
    assert all(place.startswith(f"{short}/d/") for place in places)
    assert (short / "d/etc/munge.key").stat().st_mode & 0o777 == 0o600
    assert all((short / f"d/dev/gpu{number}").is_char_device() for number in range(devslurm.GPUS))
    ports = [word.partition("=")[2] for word in made.conf.read_text().split() if word.startswith("Port=")]
    assert len({*ports, settings["SlurmctldPort"]}) == 3
    assert devslurm.prepare(short / "d", 3).names == ("node1", "node2", "node3"), "an old one is replaced"


def test_the_surroundings_of_another_cluster_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "theirs")
    monkeypatch.setenv("SLURM_CONF", "/theirs")
    environment = DevSlurm(Path("/d"), 1).environment()
    assert environment["SLURM_CONF"] == "/d/etc/slurm.conf"
    assert "SBATCH_PARTITION" not in environment


def test_without_a_cluster(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "down"]) == 0
    assert main(["cluster", "status"]) == 1
    assert capsys.readouterr().out.count("no cluster is up") == 2
    assert main(["cluster", "status", "--conf"]) == 2
