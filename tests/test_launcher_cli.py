"""The command line: light, helpful, one line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import recipes
from launcher.cli import build_parser, main
from tests.recipes import write_recipe

HEAVY = {"torch", "pydantic", "yaml", "rich", "numpy"}


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a bad command leaves."""
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_launcher_never_imports_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, launcher, cluster\n"
        "for package in (launcher, cluster):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        module.name.endswith('__main__') or importlib.import_module(module.name)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_command_shows_an_example() -> None:
    _, commands = build_parser()
    for name, command in commands.items():
        assert f"example: vqscale {name}" in command.format_help()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["sumbit"], "did you mean 'submit'?"),
        (["submit", "tiny", "--folow"], "did you mean '--follow'?"),
        (["submit"], "required: RECIPE;"),
        (["show", "a", "b"], "unexpected argument 'b'"),
        (["logs", "x", "--rank", "one"], "invalid int value: 'one'"),
        (["status", "nothing"], "there are no runs yet"),
        (["schema", "--jason"], "unknown option '--jason'"),
    ],
)
def test_bad_command_lines(argv: list[str], expected: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in error_of(capsys, *argv)


def test_bad_recipes(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_recipe(home / "r.yaml"))
    for overrides, expected in [
        (["tokenizer.hiden=3"], "did you mean 'tokenizer.hidden'?"),
        (["tokenizer.training.steps=many"], "'tokenizer.training.steps' is 'many'"),
        (["data.image_size=18"], "18 is not divisible by 8"),
        (["resources.processes=3"], "data.streams 2 is not divisible"),
        (["--on", "locla"], "did you mean 'local'?"),
        (["--stages", "piror"], "stages: generate"),
    ]:
        assert expected in error_of(capsys, "submit", path, *overrides)
    assert not (home / "runs").exists(), "nothing was made"


def test_unknown_recipe_lists_names(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(home / "faces.yaml")
    monkeypatch.setattr(recipes, "RECIPES", home)
    assert main(["plan", "faces", "--json"]) == 0
    capsys.readouterr()
    line = error_of(capsys, "plan", "facse")
    assert "did you mean 'faces'?" in line
    assert "no such recipe" in error_of(capsys, "plan", "missing/recipe.yaml")


def test_errors_in_real_processes_are_one_line(home: Path) -> None:
    path = str(write_recipe(home / "r.yaml", tokenizer__hiden=3))
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "submit", path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_options_and_overrides_mix(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_recipe(home / "r.yaml"))
    assert main(["submit", path, "seed=1", "--prepare-only", "sample.seed=-2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    recipe = (Path(facts["path"]) / "recipe.yaml").read_text()
    assert "seed: 1\n" in recipe
    assert "seed: -2\n" in recipe


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["tokenizer"]["description"] == "Stage one."


def test_broken_pipe_is_no_error(home: Path) -> None:
    command = f"{sys.executable} -m launcher schema | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
