"""Help texts: examples that can be pasted, and values that are those of the code."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks.__main__ as bench
from launcher import cli
from launcher.commands import checkpoints
from launcher.listing import STATES
from pipelines import codes, data, draw_options, export, reevaluate
from vqscale.arguments import OneLineParser
from vqscale.stages import STAGES, TRAINED
from vqscale.version import __version__


def parsers() -> Iterator[OneLineParser]:
    """Those of all commands whose options somebody types."""
    _, commands = cli.build_parser()
    yield from (commands[name] for name in commands if name not in cli._READ_ELSEWHERE)
    for program in (data, codes, checkpoints):
        yield from program._parsers()[1].values()
    yield from (draw_options.command_parser(), reevaluate._parser(), export._parser(), bench._parser())


PARSERS = {parser.prog: parser for parser in parsers()}


@pytest.mark.parametrize("prog", PARSERS)
def test_examples_can_be_pasted(prog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # a narrow terminal wraps everything else
    help_text = PARSERS[prog].format_help()
    _, found, end = help_text.partition("\nexample")
    assert found, "no example"
    lines = [line.strip().removeprefix(": ") for line in end.removeprefix("s:").splitlines()]
    commands = [line for line in lines if line.startswith("vqscale ")]
    assert commands
    for line in commands:
        words = shlex.split(line.partition(" > ")[0])
        name = prog.split()
        assert words[: len(name)] == name
        PARSERS[prog].parse(words[len(name) :])


@pytest.mark.parametrize("prog", PARSERS)
def test_defaults_are_worded_alike(prog: str) -> None:
    for action in PARSERS[prog]._actions:
        text = action.help or ""
        assert "left out" not in text, action.option_strings
        assert text.count("default") == text.count("(default: "), action.option_strings
        if action.type is int and action.default is not None and action.dest != "workers":
            assert f"(default: {action.default}" in text, action.option_strings


def help_of(prog: str, option: str) -> str:
    text = PARSERS[prog]._option_string_actions[option].help
    assert text
    return text


def test_values_are_listed() -> None:
    for prog, option in (("plan", "--stages"), ("submit", "--stages"), ("requeue", "--stages"), ("logs", "--stage")):
        assert all(stage in help_of(f"vqscale {prog}", option) for stage in STAGES)
    for prog in ("trace", "checkpoints ls"):
        assert " or ".join(TRAINED) in help_of(f"vqscale {prog}", "--stage")
    for prog in ("ls", "status"):
        assert ", ".join(STATES) in help_of(f"vqscale {prog}", "--state")
    assert {"gone", "unreadable"} <= set(STATES)
    assert help_of("vqscale sample", "--output") == "png, webdataset or npz (default: as sample.output)"


def test_sweeps_are_named_where_they_are_taken() -> None:
    for prog in ("status", "cancel", "requeue"):
        assert "folder or id of a sweep" in " ".join(PARSERS[f"vqscale {prog}"].format_help().split())


def test_version() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    done = subprocess.run([sys.executable, "-m", "launcher", "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"vqscale {__version__}\n", "")
