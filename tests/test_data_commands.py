import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.data_helpers import image_folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    done = run("pack", image_folder(root / "src"), root / "out", "--size", 8, "--holdout", 6, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert f"data.train={root}/out/train" in done.stdout
    assert f"data.validation={root}/out/validation" in done.stdout
    assert "packing: 30 of 30 images" in done.stderr
    return root / "out"


def test_show_counts_and_draws(packed: Path, tmp_path: Path):
    shown = run("show", packed / "train", "--sheet", tmp_path / "sheet.png", "--samples", 9)
    assert shown.returncode == 0, shown.stderr
    assert "24 images of 8×8 in 3 classes" in shown.stdout
    assert Image.open(tmp_path / "sheet.png").size == (26, 26)  # three by three, a pixel apart
    counts = json.loads(run("show", packed / "train", "--json").stdout)["class_counts"]
    assert sum(counts.values()) == 24
    assert set(counts) == {"class0", "class1", "class2"}


def test_verify_lists_faults(packed: Path):
    assert run("verify", packed / "train").returncode == 0
    shard = next((packed / "validation").glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[:600] + b"!" + content[601:])
    found = run("verify", packed / "validation", "--json")
    shard.write_bytes(content)
    assert found.returncode == 1
    assert "sha256" in json.loads(found.stdout)["faults"][0]


def test_faults_are_one_line_with_code_2(packed: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for arguments in (
        ("pack", tmp_path / "empty", tmp_path / "out", "--size", 8),
        ("pack", packed.parent / "src", packed / "train", "--size", 8),
        ("show", tmp_path / "empty"),
        ("verify", packed),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")


def test_help_names_the_command():
    assert "usage: vqscale data pack" in run("pack", "--help").stdout
