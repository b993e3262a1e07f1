"""Families: the runs of a list of models, as a sweep, and the comparison that is made of them.

FAMILY/
  sweep.json, FAMILY.MEMBER/    as of any sweep
  family.json                   budget, members, how each of them stands
  comparison.html, .json, .md   their figures side by side
  samples.png                   a row of drawn images for each member
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.backends.base import SOURCE
from launcher.plan import Plan, make_plan
from launcher.recipes import find_recipe
from launcher.sharing import Shares, shared_stages
from launcher.status import read_status
from vqscale.config.family import Family, Member
from vqscale.config.layout import RunLayout
from vqscale.config.load import load_model
from vqscale.errors import UserError
from vqscale.files import read_json, write_json

RECORD = "family.json"
PAGE, FACTS, MARKDOWN = "comparison.html", "comparison.json", "comparison.md"


@dataclass(frozen=True)
class FamilyPlan:
    """A family whose members have all been checked."""

    folder: Path
    family: Family
    plans: tuple[Plan, ...]
    """A plan for each member, in their order."""

    @property
    def runs(self) -> list[str]:
        """Names of the runs' folders."""
        return [plan.job.run.name for plan in self.plans]

    @property
    def after(self) -> dict[str, str]:
        """Run → the one whose output it reads."""
        return {plan.job.run.name: plan.shares.run.name for plan in self.plans if plan.shares}

    def record(self, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """Plain values for `family.json`; how the members stand is added when it is known.

        Args:
            before: an earlier record, whose other members stay.
        """
        members = [
            {"name": member.name, "about": member.about, "run": plan.job.run.name, **_shared(plan)}
            for member, plan in zip(self.family.members, self.plans, strict=True)
        ]
        common = self.family.model_dump(mode="json", include={"family", "about", "budget", "published", "note"})
        known = {member["name"] for member in members}
        kept = [member for member in (before or {"members": []})["members"] if member["name"] not in known]
        return {**common, "members": [*kept, *members]}


def load_family(path: Path, overrides: Sequence[str]) -> tuple[Family, list[str]]:
    """A list, and what of the command line's settings is for the recipes of all its members.

    Raises:
        UserError: unreadable file, unknown key, wrong type.
    """
    own = [text for text in overrides if text.partition("=")[0].partition(".")[0] in Family.model_fields]
    return load_model(Family, path, own), [text for text in overrides if text not in own]


def make_family_plan(
    family: Family, beside: Path, folder: Path, on: str = "local", overrides: Sequence[str] = ()
) -> FamilyPlan:
    """Resolve and check all members.

    Args:
        family: the list.
        beside: folder that the list lies in.
        folder: of the family's runs.
        on: name of a profile, or path of its YAML file.
        overrides: `dotted.key=value` texts for all members.

    Raises:
        UserError: the first thing that is wrong; names the member.
    """
    plans: list[Plan] = []
    for member in family.members:
        try:
            plans.append(_member_plan(family, member, beside, folder, on, overrides, plans))
        except UserError as error:
            where = ", ".join(filter(None, (f"member {member.name}", error.where)))
            raise UserError(error.what, where=where, mend=error.mend) from None
    return FamilyPlan(folder, family, tuple(plans))


def _member_plan(
    family: Family,
    member: Member,
    beside: Path,
    folder: Path,
    on: str,
    overrides: Sequence[str],
    earlier: Sequence[Plan],
) -> Plan:
    recipe, run = str(find_recipe(member.recipe, beside)), folder / f"{folder.name}.{member.name}"
    settings = family.settings(member, recipe, overrides)
    alone = make_plan(recipe, on, settings, run=run)
    if earlier:
        _require_same_images(alone, earlier[0])
    shares = _shares(alone, earlier)
    return make_plan(recipe, on, settings, run=run, shares=shares) if shares else alone


def _require_same_images(plan: Plan, first: Plan) -> None:
    """Figures of different images do not compare."""
    for key, of in (
        ("data.image_size", lambda recipe: recipe.data.image_size),
        ("data.validation", lambda recipe: recipe.data.validation),
        ("data.clocks", lambda recipe: recipe.data.clocks),
        ("values of an image", lambda recipe: recipe.dimensions),
    ):
        ours, theirs = of(plan.job.recipe), of(first.job.recipe)
        if ours != theirs:
            mend = "all members have to be measured on the same images"
            raise UserError(f"is {_brief(ours)}, but {_brief(theirs)} in the first member", where=key, mend=mend)


def _brief(value: Any) -> str:
    return str(value or "not set")


def _shares(plan: Plan, earlier: Sequence[Plan]) -> Shares | None:
    """What of the member's work an earlier one does, or has from another: the most that can be had."""
    found = [Shares(other.job.run, shared_stages(plan.job.recipe, other.job.recipe)) for other in earlier]
    best = max(found, key=lambda shares: len(shares.stages), default=None)  # of several the first
    return best if best and best.stages else None


def _shared(plan: Plan) -> dict[str, Any]:
    return {"shares": {"run": plan.shares.run.name, "stages": list(plan.shares.stages)}} if plan.shares else {}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a family in a folder; None where there is none."""
    record: dict[str, Any] | None = read_json(folder / RECORD)
    return record


def write_comparison(folder: Path) -> None:
    """Write the comparison of what a family's members have come to so far; nothing where the folder has no family.

    Raises:
        UserError: the page could not be written.
    """
    record = read_record(folder)
    if record is None:
        return
    for member in record["members"]:
        status = read_status(RunLayout(folder / member["run"]), depth="none")
        member |= {"state": status.state, "message": status.message}
    write_json(folder / RECORD, record)
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "pipelines.compare", str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError("the comparison was not written", where=str(folder), mend="the lines above say why")
