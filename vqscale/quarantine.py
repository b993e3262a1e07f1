"""The list of bad samples that a stage leaves behind, each once; written by the stage, counted by `status`."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


class Quarantine:
    """A file of JSON lines with `shard`, `key`, `kind` and `time`; continued over attempts. One process writes it.

    Args:
        path: the file; made with the first bad sample.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = {(line["shard"], line["key"], line["kind"]) for line in read_quarantine(path)}

    def add(self, bad: Sequence[tuple[str, str, str]]) -> None:
        """Add the (shard, key, kind) that are not listed yet."""
        fresh = [name for name in dict.fromkeys(bad) if name not in self._known]
        if not fresh:
            return
        self._known.update(fresh)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        now = round(time.time(), 3)
        with self._path.open("a+", encoding="utf-8", errors="backslashreplace") as file:
            if _is_torn(self._path):  # a kill cut the last line off
                file.write("\n")
            for shard, key, kind in fresh:
                line = {"shard": shard, "key": key, "kind": kind, "time": now}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def count_by_kind(path: Path) -> dict[str, int]:
    """Kind → bad samples on the list, the most frequent first."""
    return dict(Counter(line["kind"] for line in read_quarantine(path)).most_common())


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def read_quarantine(path: Path) -> list[dict[str, str]]:
    """The lines of the list; none where there is no file. A line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
