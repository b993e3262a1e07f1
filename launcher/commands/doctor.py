"""The command doctor: verdicts over the machines of a profile."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from cluster.preflight.verdict import Verdict
from cluster.profile import Profile
from launcher.backends.everywhere import refuse_too_many
from launcher.doctor import TOGETHER, Examination
from launcher.plan import load_profile
from launcher.tables import console
from vqscale.errors import UserError

EXIT_FAIL = 1
"""Exit code when a check fails."""

_STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red", "n/a": "dim"}


def doctor(arguments: argparse.Namespace) -> int:
    """Check the machines; exit code 1 when a check fails."""
    profile = load_profile(arguments.on)
    if arguments.wait < 1:
        raise UserError(f"waits {arguments.wait} s", where="--wait", mend="choose 1 or more")
    nodes = _nodes(arguments.nodes, profile)
    examination = Examination(profile, nodes, _absolute(arguments.shards or ""), arguments.wait)
    if profile.backend != "local":
        inside = f", inside {profile.container.image}" if profile.container else ""
        print(
            f"asks {nodes} nodes of {profile.name}{inside}; waits {arguments.wait} s for them at most", file=sys.stderr
        )
    found: list[Verdict] = []
    for verdict in examination.verdicts():
        found.append(verdict)
        if not arguments.json and verdict.where in TOGETHER:
            _print(verdict)
    if arguments.json:
        print(json.dumps([asdict(verdict) for verdict in found], indent=2, ensure_ascii=False))
    else:
        for verdict in folded(found):
            _print(verdict)
        print(_summary(found))
    return EXIT_FAIL if any(verdict.word == "FAIL" for verdict in found) else 0


def _nodes(asked: int | None, profile: Profile) -> int:
    """As many as a stage has; two where that is left open, since one shows nothing of the network."""
    if asked is not None and asked < 1:
        raise UserError(f"{asked} nodes", where="--nodes", mend="choose 1 or more")
    section = profile.slurm or profile.kubernetes
    usual = max(1, len(profile.ssh.usable)) if profile.ssh else 1 if section is None else section.nodes or 2
    refuse_too_many(profile, asked or usual)
    return asked or usual


def folded(found: Sequence[Verdict]) -> list[Verdict]:
    """Verdicts of single nodes by check; those that come to the same on several nodes are one line."""
    groups: dict[tuple[str, str, str], list[Verdict]] = {}
    checks = list(dict.fromkeys(verdict.check for verdict in found))
    single = (verdict for verdict in found if verdict.where not in TOGETHER)
    for verdict in sorted(single, key=lambda verdict: checks.index(verdict.check)):
        groups.setdefault((verdict.check, verdict.word, verdict.mend), []).append(verdict)
    return [_as_one(group) for group in groups.values()]


def _as_one(group: Sequence[Verdict]) -> Verdict:
    values = sorted({verdict.value for verdict in group}, key=_number)
    value = values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
    return replace(group[0], where=group[0].where if len(group) == 1 else f"{len(group)} nodes", value=value)


def _number(text: str) -> tuple[float, str]:
    """Figures by their size, other values by their letters."""
    found = re.match(r"[\d,.]+", text)
    return (float(found[0].replace(",", "").rstrip(".") or 0) if found else 0.0, text)


def _absolute(shards: str) -> str:
    """As seen from here: the nodes work in another folder."""
    return shards if not shards or "://" in shards else str(Path(shards).expanduser().absolute())


def _print(verdict: Verdict) -> None:
    from rich.text import Text

    limit = f"  ({verdict.limit})" if verdict.limit else ""
    head = (f"{verdict.word:<4}", _STYLES[verdict.word])
    console().print(Text.assemble(head, f"  {verdict.where:<10} {verdict.check:<16} {verdict.value}{limit}"))
    if verdict.mend:
        console().print(Text(f"{'':17}mend: {verdict.mend}"))


def _summary(found: Sequence[Verdict]) -> str:
    counts = {word: sum(verdict.word == word for verdict in found) for word in _STYLES}
    return ", ".join(f"{number} {word}" for word, number in counts.items() if number)
