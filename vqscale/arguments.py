"""Command lines whose faults are one line: what is wrong, and the nearest that would be right.

Used by `launcher` and `pipelines`, which may not import each other. Imports nothing heavy: `vqscale --help` waits
for it.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from vqscale.errors import EXIT_USER_ERROR, UserError

RUN_HELP = "run directory, id, beginning of an id, or latest"
"""How a run is named on a command line."""


class _Help(argparse.HelpFormatter):
    """Wraps texts, but neither examples, which are pasted, nor what follows them."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises `UserError` instead of printing its usage, and that takes no shortened options."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Help)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage."""
        raise UserError(message, where=self.prog, mend=f"see {self.prog} --help")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse a command line; options may stand anywhere.

        Raises:
            UserError: a wrong value, or an option that there is not; names the nearest.
        """
        # Asked first: a misspelt option would else be reported as the lack of the right one.
        for word in itertools.takewhile(lambda word: word != "--", words):
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                raise self._unknown(word)
        # Intermixed, since `submit RECIPE seed=1 --follow prior.width=64` is what people type.
        arguments, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            raise self._unknown(unknown[0])
        return arguments

    def _unknown(self, word: str) -> UserError:
        options = [option for option in self._option_string_actions if option.startswith("--")]
        kind = "unknown option" if word.startswith("-") else "unexpected argument"
        hint = did_you_mean(word.partition("=")[0], options)
        return UserError(f"{kind} '{word}'", where=self.prog, mend=f"{hint}see {self.prog} --help")


def run_program(
    parser: OneLineParser, commands: Mapping[str, OneLineParser], words: Sequence[str], *, stopped: str = "stopped"
) -> int:
    """Run one of a program's commands; returns the exit code.

    Args:
        parser: of the program.
        commands: its commands' parsers by name, each with the function that does the work as the default of `run`.
        words: the command line, from the name of the command on.
        stopped: what is said upon Ctrl-C.
    """
    try:
        options = commands[choose_command(parser, commands, words)].parse(words[1:])
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130


def refuse_both(options: argparse.Namespace, command: str, *pair: str) -> None:
    """Refuse two options that were both given.

    Args:
        options: what was parsed.
        command: whose options they are.
        pair: their names, such as `--follow`.

    Raises:
        UserError: both were given.
    """
    if all(getattr(options, name.strip("-").replace("-", "_")) for name in pair):
        raise UserError(f"{' and '.join(pair)} exclude each other", where=command, mend="leave one out")


def either(words: Sequence[str]) -> str:
    """The values of an option as its help lists them: `a, b or c`."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def examples(*lines: str) -> str:
    """The end of a help text: command lines as they are typed, each of which stays on its line."""
    if len(lines) == 1:
        return f"example: {lines[0]}"
    return "\n  ".join(("examples:", *lines))


def choose_command(parser: OneLineParser, commands: Iterable[str], words: Sequence[str]) -> str:
    """The command that a line begins with; `--help`, or nothing, prints the parser's help and exits.

    Other options of the parser, such as `--version`, do what they do and exit likewise.

    Raises:
        UserError: there is no such command.
    """
    name = words[0] if words else "--help"
    if name in parser._option_string_actions:
        parser.parse_args([name])
    require_command(name, commands, parser.prog)
    return name


def require_command(name: str, commands: Iterable[str], where: str) -> None:
    """Check the name of a command.

    Args:
        name: what was typed.
        commands: those there are.
        where: program that they belong to, for the error.

    Raises:
        UserError: there is no such command; names the nearest, and all.
    """
    names = list(commands)
    if name not in names:
        hint = did_you_mean(name, names)
        raise UserError(f"unknown command '{name}'", where=where, mend=f"{hint}commands: {', '.join(names)}")


def did_you_mean(word: str, valid: Sequence[str], prefix: str = "") -> str:
    """`did you mean 'PREFIXNEAREST'? `, with a blank behind it; empty when nothing is near."""
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean '{prefix}{near[0]}'? " if near else ""
