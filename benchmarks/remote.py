"""A program in a process of its own that answers questions, one JSON object a line.

It serves ranks, which cannot live in the process of the benchmark, and peers whose packages cannot be installed beside
ours. Imports the standard library alone, since it runs in their environments too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_ROOT = Path(__file__).resolve().parents[1]
_LAST_WORDS = 3_000


class RemoteError(RuntimeError):
    """The program failed; the text holds its traceback or its last words."""


class Remote:
    """Starts a program and asks it; close it, or use it as a context.

    Args:
        command: the program, with its arguments.
        environment: variables above those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._program = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """The program's answer.

        Raises:
            RemoteError: it failed, or has ended.
        """
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        try:
            print(json.dumps(question), file=self._program.stdin, flush=True)
            line = self._program.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RemoteError(f"ended with exit code {self._program.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RemoteError(answer["error"])
        return answer

    def close(self) -> None:
        """Let it end; it is waited for, so its CPU time counts as this process's."""
        if self._program.stdin is not None and not self._program.stdin.closed:
            self._program.stdin.close()
        try:
            self._program.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._program.kill()
            self._program.wait()
        if self._program.stdout is not None:
            self._program.stdout.close()
        self._errors.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-_LAST_WORDS:].decode(errors="replace").strip()


def serve(answer: Answer) -> None:
    """Answer the questions on standard input until it ends; what is printed meanwhile goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), file=out, flush=True)
