"""A family: recipes that are trained on as many images each and compared. A YAML file lists its members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from vqscale.config.load import load_recipe
from vqscale.config.recipe import Recipe
from vqscale.config.section import Positive, Section
from vqscale.errors import UserError
from vqscale.stages import TRAINED

_MANY = 10**9
_STEPS = "{}.training.steps"
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class Budget(Section):
    """What every member is trained on: its steps follow from this and its own `global_batch`."""

    tokenizer: Positive
    """Images that each tokenizer sees in training."""
    prior: Positive
    """Images whose latents each prior sees in training."""


class Member(Section):
    """One model of the family."""

    name: Name
    """Name of its run and of its row in the comparison."""
    recipe: str
    """Name of a recipe that comes with vqscale, or a YAML file; looked for beside the list, too."""
    about: str = ""
    """What it is, in a few words, for the comparison."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted key → value, above the recipe's and the family's."""


class Published(Section):
    """A figure of the literature that stands beside the family's."""

    model: str
    """Name of the model."""
    bits_per_dim: Annotated[float, Field(gt=0)]
    """Bits per dimension on held-out images, as it was published."""
    source: str
    """Authors and year."""


class Family(Section):
    """The members, and what they have in common."""

    family: Name
    """Name of the family."""
    about: str = ""
    """What is compared; stands at the head of the comparison."""
    budget: Budget
    """What every member is trained on."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted key → value, for all members."""
    members: Annotated[tuple[Member, ...], Field(min_length=1)]
    """The models, in the order in which they are trained and shown."""
    published: tuple[Published, ...] = ()
    """Figures of the literature, where they were measured on images of this kind."""
    note: str = ""
    """What has to be said beside the published figures."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [member.name for member in self.members]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"members: two are called '{twice}'; give each its own name")
        return self

    @model_validator(mode="after")
    def _steps_follow(self) -> Self:
        named = [("overrides", self.overrides)]
        named += [(f"members.{number}.overrides", member.overrides) for number, member in enumerate(self.members)]
        for where, overrides in named:
            for stage in TRAINED:
                if _says_steps(overrides, stage):
                    raise ValueError(f"{where}: {_STEPS.format(stage)} follows from the budget; set budget.{stage}")
        return self

    def chosen(self, names: Sequence[str]) -> Self:
        """The family with these members alone, in its own order.

        Raises:
            UserError: it has no such member.
        """
        there = [member.name for member in self.members]
        unknown = [name for name in names if name not in there]
        if unknown or not names:
            what = f"no member '{unknown[0]}'" if unknown else "names no member"
            raise UserError(what, where="--members", mend=f"members: {', '.join(there)}")
        return self.model_copy(update={"members": tuple(each for each in self.members if each.name in names)})

    def settings(self, member: Member, path: str, more: Sequence[str] = ()) -> tuple[str, ...]:
        """All that changes a member's recipe, as `dotted.key=value`; the steps that the budget comes to stand last.

        Args:
            member: one of this family.
            path: file of its recipe.
            more: overrides of the command line, above the list's.

        Raises:
            UserError: a fault in a setting, or a batch that the budget is no multiple of.
        """
        said = next((stage for stage in TRAINED for text in more if text.startswith(f"{_STEPS.format(stage)}=")), None)
        if said:
            raise UserError("follows from the budget", where=_STEPS.format(said), mend=f"set budget.{said}")
        changed = (*_texts(self.overrides), *_texts(member.overrides), *more)
        # Steps of more than any other setting asks for: a section that the list replaces need not name any.
        recipe = load_recipe(path, [*changed, *(f"{_STEPS.format(stage)}={_MANY}" for stage in TRAINED)])
        return (*changed, *(f"{_STEPS.format(stage)}={self._steps(recipe, stage)}" for stage in TRAINED))

    def _steps(self, recipe: Recipe, stage: str) -> int:
        images, batch = getattr(self.budget, stage), getattr(recipe, stage).training.global_batch
        if images % batch:
            below = images // batch * batch
            near = [str(number) for number in (below, below + batch) if number]
            raise UserError(
                f"{images} images are no multiple of {stage}.training.global_batch {batch}",
                where=f"budget.{stage}",
                mend=f"use {' or '.join(near)}",
            )
        return int(images // batch)


def _says_steps(overrides: Mapping[str, Any], stage: str) -> bool:
    """Whether settings have steps of a stage in them: by the dotted key, or inside a section."""
    if _STEPS.format(stage) in overrides:
        return True
    whole = overrides.get(stage)
    sections = [overrides.get(f"{stage}.training"), whole.get("training") if isinstance(whole, dict) else None]
    return any(isinstance(section, dict) and "steps" in section for section in sections)


def _texts(overrides: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_inline(value)}" for key, value in overrides.items()]


def _inline(value: Any) -> str:
    """A value as YAML in one line, as `load_recipe` reads it back."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()
