"""Command lines: faults are one line that names the nearest; `vqscale data` and the stages share it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines import data
from vqscale.arguments import OneLineParser, did_you_mean, require_command
from vqscale.errors import UserError


def parser() -> OneLineParser:
    made = OneLineParser(prog="try")
    made.add_argument("name")
    made.add_argument("settings", nargs="*")
    made.add_argument("--size", type=int, required=True)
    return made


def test_options_may_stand_anywhere() -> None:
    parsed = parser().parse(["a", "x=1", "--size", "3", "y=2"])
    assert (parsed.name, parsed.settings, parsed.size) == ("a", ["x=1", "y=2"], 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "--sise", "3"], "try: unknown option '--sise'; did you mean '--size'? see try --help"),
        (["a", "--sise=3"], "unknown option '--sise=3'; did you mean '--size'?"),
        (["a", "--si", "3"], "unknown option '--si'"),
        (["a", "--size", "big"], "argument --size: invalid int value: 'big'"),
        (["a"], "required: --size"),
        (["a", "-x", "--size", "3"], "unknown option '-x'"),
    ],
)
def test_faults_are_one_line(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parser().parse(words)
    assert expected in str(caught.value)


def test_commands_by_name() -> None:
    require_command("pack", ["pack", "show"], "try")
    with pytest.raises(UserError, match=r"try: unknown command 'pakc'; did you mean 'pack'\? commands: pack, show"):
        require_command("pakc", ["pack", "show"], "try")
    assert did_you_mean("nothing", ["pack"]) == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pakc"], "did you mean 'pack'?"),
        (["pack", "a", "b", "--sise", "8"], "did you mean '--size'?"),
        (["pack", "a"], "arguments are required: "),
        (["pack", "a", "b", "--size", "8", "--format", "bmp"], "argument --format: invalid choice: 'bmp'"),
        (["show", "a", "--sample", "8"], "did you mean '--samples'?"),
    ],
)
def test_data_commands(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: vqscale data")
    assert printed.err.count("\n") == 1
    assert expected in printed.err


def test_stages_say_it_in_one_line_too() -> None:
    command = [sys.executable, "-m", "pipelines.sample", "--rundir", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: torchrun -m pipelines.sample: unknown option '--rundir'; did you mean '--run-dir'? "
        "see torchrun -m pipelines.sample --help"
    ]
