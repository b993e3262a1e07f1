"""Installed packages, against those that vqscale needs and the versions that it is tested with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from cluster.preflight.verdict import Verdict, expect


def installed() -> dict[str, str]:
    """Package → version of all that can be imported here."""
    # setuptools puts copies of its own onto the path of any process that has loaded it.
    found = [_head(dist) for dist in metadata.distributions() if Path(str(dist.locate_file(""))).name != "_vendor"]
    # Backwards: of several versions the first on the path is the one that is imported.
    return {_normal(head["Name"]): head["Version"] for head in reversed(found) if head.keys() >= {"Name", "Version"}}


def _head(dist: metadata.Distribution) -> dict[str, str]:
    """Name and version, by two lines: `dist.name` parses the whole text each time, half a second for 150 packages."""
    text = dist.read_text("METADATA") or dist.read_text("PKG-INFO") or ""
    return dict(re.findall(r"^(Name|Version): *(\S+)", text.partition("\n\n")[0], re.MULTILINE))


def required() -> list[str]:
    """Names of the packages that vqscale asks for, without those of extras."""
    asked = [line for line in metadata.requires("vqscale") or [] if "extra ==" not in line]
    return [_normal(found[0]) for line in asked if (found := re.match(r"[\w.-]+", line))]


def read_constraints(path: Path) -> dict[str, str] | None:
    """Package → version of a constraints file; None where there is none."""
    if not path.is_file():
        return None
    pairs = (line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {_normal(name): version.strip() for name, version in pairs}


def judge_packages(
    where: str, there: Mapping[str, str], needed: Sequence[str], constraints: Mapping[str, str] | None
) -> list[Verdict]:
    """Whether all that is needed is there, and in the versions that vqscale is tested with.

    Args:
        where: the machine.
        there: package → version.
        needed: names of packages.
        constraints: package → version; None where the file is not there.
    """
    missing = [name for name in needed if name not in there]
    value = f"lacks {', '.join(missing)}" if missing else f"all {len(needed)} needed"
    whole = expect("packages", where, not missing, value, mend="make setup")
    if constraints is None:
        return [whole, Verdict("versions", where, "n/a", "no constraints.txt beside the code")]
    return [whole, _judge_versions(where, there, constraints)]


def _judge_versions(where: str, there: Mapping[str, str], constraints: Mapping[str, str]) -> Verdict:
    other = [
        f"{name} {there[name]} ({version})"
        for name, version in constraints.items()
        if there.get(name, version).partition("+")[0] != version
    ]
    more = f" and {len(other) - 4} more" if len(other) > 4 else ""
    value = f"torch {there.get('torch', 'is missing')}"
    value += f"; not as tested: {', '.join(other[:4])}{more}" if other else ", all as tested"
    return expect("versions", where, not other, value, limit="constraints.txt", mend="make setup", word="warn")


def _normal(name: str) -> str:
    """Names of packages are the same whatever their case, with `_` or `-`."""
    return name.strip().lower().replace("_", "-")
