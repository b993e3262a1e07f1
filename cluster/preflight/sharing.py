"""Whether a folder is really shared: each machine leaves a token in it, and looks for those of the others."""

from __future__ import annotations

import os
import time
from pathlib import Path

_POLL_S = 0.1
_SUFFIX = ".token"


def leave(folder: Path, name: str, token: str) -> str:
    """Leave this machine's token; returns why it could not, else nothing."""
    try:
        with (folder / f"{name}{_SUFFIX}").open("w", encoding="utf-8") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def seen(folder: Path, token: str) -> list[str]:
    """Names of the machines whose token is there and is that of this trial, not of an earlier one."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return []
    return sorted(path.stem for path in paths if path.suffix == _SUFFIX and _content(path) == token)


def await_all(folder: Path, token: str, number: int, limit_s: float) -> list[str]:
    """The same, when there are so many of them, or after `limit_s`."""
    limit = time.monotonic() + limit_s
    while len(names := seen(folder, token)) < number and time.monotonic() < limit:
        time.sleep(_POLL_S)
    return names


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
