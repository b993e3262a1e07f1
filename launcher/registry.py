"""Where runs are: an index in the user's home, so that commands work from any directory."""

from __future__ import annotations

import difflib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vqscale.config.layout import LOCK, RunLayout
from vqscale.errors import UserError
from vqscale.files import read_json, write_json


@dataclass(frozen=True)
class Entry:
    """One run of the index, or one sweep: both have their ids from one set of names."""

    id: str
    path: Path
    created: float
    kind: Literal["run", "sweep"] = "run"

    @property
    def exists(self) -> bool:
        """Whether the directory is still there."""
        return self.path.is_dir() if self.kind == "sweep" else RunLayout(self.path).info.exists()


def home() -> Path:
    """Folder of the index: $VQSCALE_HOME, else ~/.vqscale."""
    return Path(os.environ.get("VQSCALE_HOME") or "~/.vqscale").expanduser().absolute()


def runs_root() -> Path:
    """Folder of new runs: $VQSCALE_RUNS, else ./runs."""
    return Path(os.environ.get("VQSCALE_RUNS") or "runs").expanduser().absolute()


def choose_directory(name: str, asked: str | None, now: float | None = None, option: str = "--run") -> Path:
    """Directory of a new run; nothing is made (`make_directory` does, if nobody else was faster).

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
    taken = {file.stem for file in _folder().glob("*.json")}
    for run_id in _names(f"{name}-{stamp}"):
        path = runs_root() / run_id
        if run_id not in taken and not path.exists():
            return path.resolve()
    raise UserError(f"too many runs called {name}-{stamp}", mend=f"choose a directory with {option} DIR")


def make_directory(path: Path) -> bool:
    """Make the directory of a new run or sweep; False where another command has it.

    Several may have found it free, or empty: it is whose who makes the lock in it, which the kernel lets one do.

    Raises:
        UserError: it cannot be made.
    """
    lock = path / LOCK
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.open("x").close()
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"cannot be made ({error.strerror})", where=str(path), mend="choose another place") from None
    if any(other.name != LOCK for other in path.iterdir()):
        lock.unlink()
        return False
    return True


def taken(path: Path) -> UserError:
    """What to say where `make_directory` was too late for the directory that somebody wants."""
    what = "another command makes it, or was killed while it did"
    return UserError(what, where=str(path), mend="choose another directory, or remove it")


def require_writable() -> None:
    """Before anything is made: what is not in the index is not found again.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        _folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error.strerror) from None
    if not os.access(_folder(), os.W_OK | os.X_OK):
        raise _unwritable("Permission denied")


def claim(name: str, path: Path, created: float, kind: Literal["run", "sweep"] = "run") -> str:
    """Put a new run or sweep into the index by its name; by NAME-2 and so on where that is taken. Returns its id.

    The directory is the caller's (`make_directory`). So an entry of the same directory is what is left of one that was
    removed, and is replaced. One whose directory is gone keeps its id: its storage may come back.
    """
    for run_id in _names(name):
        entry = Entry(run_id, path, created, kind)
        try:
            with _file(run_id).open("x", encoding="utf-8") as file:
                json.dump(_facts(entry), file)
        except FileExistsError:
            known = find(run_id)
            if known is None or known.path != path:
                continue
            _write(entry)
        return run_id
    raise UserError(f"too many runs called {name}", mend="choose a directory of another name")


def drop(entry: Entry) -> None:
    """Forget a run or sweep; its directory is left as it is."""
    _file(entry.id).unlink(missing_ok=True)


def find(run_id: str) -> Entry | None:
    """The run or sweep of an id; None where there is none, or its file is not ours."""
    try:
        tree = read_json(_file(run_id))
        kind: Literal["run", "sweep"] = "sweep" if tree.get("kind") == "sweep" else "run"
        return Entry(str(tree["id"]), Path(tree["path"]), float(tree["created"]), kind)
    except (UserError, AttributeError, ValueError, KeyError, TypeError):
        return None


def everything() -> list[Entry]:
    """All runs and sweeps of the index, the oldest first. A file that is not ours is passed over."""
    found = (find(file.stem) for file in _folder().glob("*.json"))
    return sorted((entry for entry in found if entry), key=lambda entry: (entry.created, entry.id))


def entries() -> list[Entry]:
    """All runs of the index, the oldest first."""
    return [entry for entry in everything() if entry.kind == "run"]


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


def _folder() -> Path:
    return home() / "runs"


def _file(run_id: str) -> Path:
    return _folder() / f"{run_id}.json"


def _names(name: str) -> list[str]:
    return [name, *(f"{name}-{number}" for number in range(2, 1000))]


def _facts(entry: Entry) -> dict[str, object]:
    return {**asdict(entry), "path": str(entry.path)}


def _write(entry: Entry) -> None:
    write_json(_file(entry.id), _facts(entry))


def _unwritable(why: str | None) -> UserError:
    return UserError(f"cannot be written ({why})", where=str(_folder()), mend="set VQSCALE_HOME to a folder of yours")


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
