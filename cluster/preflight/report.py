"""What a node has measured, and how it is told to who asked: in short marked lines of its standard output."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.preflight.collective import Meeting
from cluster.preflight.disk import Folder
from cluster.preflight.gpus import Gpus
from cluster.preflight.host import Host
from cluster.preflight.reading import Reading

MARK = "vqscale-preflight "
"""Stands before each line that is ours: schedulers and libraries print too."""

_LINE = 500
"""Characters of a line's content; srun passes on a kilobyte in one piece."""
_PART = re.compile(r"(?P<node>\S+) (?P<number>\d+)/(?P<all>\d+) (?P<part>.+)")


@dataclass(frozen=True)
class Torch:
    """What torch can do on a node."""

    gpus: int = 0
    """How many it can use."""
    cuda: str = ""
    """The CUDA or ROCm that it was built for; empty for a build without."""
    fault: str = ""
    """Why it cannot be imported."""


@dataclass(frozen=True)
class Report:
    """All that one node has measured."""

    node: str
    host: Host
    gpus: Gpus
    torch: Torch
    folder: Folder
    sees: list[str]
    """Machines whose tokens it saw in the shared folder."""
    token_fault: str
    port_fault: str
    """Why the rendezvous' port cannot be had; asked on the first node only."""
    reading: Reading | None
    """None where no shards were named."""
    meeting: Meeting | None
    """None where the ranks could not meet."""
    meeting_fault: str

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Report:
        """A report from its JSON."""
        parts = {"host": Host, "gpus": Gpus, "torch": Torch, "folder": Folder, "reading": Reading, "meeting": Meeting}
        return cls(**{k: parts[k](**v) if k in parts and v is not None else v for k, v in tree.items()})


def to_lines(node: str, tree: Mapping[str, Any]) -> list[str]:
    """What a node says, in short lines: srun lets those of several nodes run into each other where they are long."""
    text = json.dumps(tree)
    parts = [text[start : start + _LINE] for start in range(0, len(text), _LINE)]
    return [f"{MARK}{node} {number}/{len(parts)} {part}" for number, part in enumerate(parts, 1)]


def from_lines(texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What nodes say, among all that is printed: a tree with `hello` and `node`, or one with `report`."""
    begun: dict[str, str] = {}
    for text in texts:
        _, mark, body = text.rstrip("\n").partition(MARK)
        found = _PART.fullmatch(body) if mark else None
        if found:
            begun[found["node"]] = ("" if found["number"] == "1" else begun.get(found["node"], "")) + found["part"]
            if found["number"] == found["all"]:
                yield json.loads(begun.pop(found["node"]))
