"""Where runs are: an index in the user's home, so that commands work from any directory."""

from __future__ import annotations

import difflib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from vqscale.config.layout import RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json


@dataclass(frozen=True)
class Entry:
    """One run of the index."""

    id: str
    path: Path
    created: float

    @property
    def exists(self) -> bool:
        """Whether the run directory is still there."""
        return RunLayout(self.path).info.exists()


def home() -> Path:
    """Folder of the index: $VQSCALE_HOME, else ~/.vqscale."""
    return Path(os.environ.get("VQSCALE_HOME") or Path.home() / ".vqscale")


def runs_root() -> Path:
    """Folder of new runs: $VQSCALE_RUNS, else ./runs."""
    return Path(os.environ.get("VQSCALE_RUNS") or "runs").expanduser().absolute()


def choose_directory(name: str, asked: str | None, now: float | None = None, option: str = "--run") -> Path:
    """Directory of a new run; nothing is made.

    Args:
        name: the recipe's name.
        asked: directory the user wants, or None for NAME-YYYYMMDD-HHMMSS below `runs_root()`.
        now: Unix time, for tests.
        option: what the user has asked with.

    Raises:
        UserError: the directory holds a run or other files.
    """
    if asked is not None:
        path = Path(asked).expanduser().resolve()
        _refuse_used(path, option)
        return path
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    taken = {entry.id for entry in entries()}
    for number in range(1, 1000):
        run_id = f"{name}-{stamp}" + (f"-{number}" if number > 1 else "")
        path = runs_root() / run_id
        if run_id not in taken and not path.exists():
            return path.resolve()
    raise UserError(f"too many runs called {name}-{stamp}", mend=f"choose a directory with {option} DIR")


def register(run_id: str, path: Path, created: float) -> None:
    """Put a run into the index."""
    write_json(home() / "runs" / f"{run_id}.json", {"id": run_id, "path": str(path), "created": created})


def entries() -> list[Entry]:
    """All runs of the index, the oldest first. A file that is not ours is passed over."""
    found = []
    for file in (home() / "runs").glob("*.json"):
        try:
            tree = read_json(file)
            found.append(Entry(str(tree["id"]), Path(tree["path"]), float(tree["created"])))
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda entry: (entry.created, entry.id))


def resolve(text: str) -> RunLayout:
    """Find a run by its directory, its id, the beginning of its id, or `latest`.

    Raises:
        UserError: none fits, or several do; the line names what is near.
    """
    by_path = RunLayout(Path(text).expanduser().absolute())
    if by_path.info.exists():
        return RunLayout(by_path.root.resolve())
    known = [entry for entry in entries() if entry.exists]
    if text == "latest" and known:
        return RunLayout(known[-1].path)
    exact = [entry for entry in known if entry.id == text]
    fitting = exact or [entry for entry in known if text and entry.id.startswith(text)]
    if len(fitting) == 1:
        return RunLayout(fitting[0].path)
    raise _unresolved(text, [entry.id for entry in known], [entry.id for entry in fitting])


def _unresolved(text: str, known: list[str], fitting: list[str]) -> UserError:
    if fitting:
        return UserError(f"'{text}' fits several runs: {', '.join(fitting[-5:])}", mend="write more of the id")
    if not known:
        return UserError(f"no run '{text}'", mend="there are no runs yet; start one with `vqscale submit RECIPE`")
    # The newest few are named when nothing is near: most people mean a run of today.
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.5) or list(reversed(known[-3:]))
    return UserError(f"no run '{text}'", mend=f"near: {', '.join(near)}; all: vqscale ls")


def _refuse_used(path: Path, option: str) -> None:
    if RunLayout(path).info.exists():
        raise UserError("holds a run already", where=str(path), mend=f"go on with it: vqscale requeue {path}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError("is not an empty directory", where=str(path), mend=f"choose another {option} DIR")
