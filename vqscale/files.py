"""Small files that must never be seen half-written."""

from __future__ import annotations

import glob
import json
import os
import socket
from pathlib import Path
from typing import Any

from vqscale.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: beside, synced, renamed. Readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hosts that share a file system share its names, but not their process ids.
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def clear_beside(path: Path) -> None:
    """Remove what killed processes have left beside a file while they wrote it; nobody may be writing it now."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a newline at its end."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; None when there is none.

    Raises:
        UserError: what it holds is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        # Such files are replaced as a whole: a kill does not leave a part of one.
        mend = "storage or somebody's hand damaged it: put it right, or back from a copy"
        raise UserError("is not JSON", where=str(path), mend=mend) from None
