"""What all parts of a recipe are made of: the strict base, and the kinds of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Places = str | tuple[str, ...]
"""One file, folder or URL, or several."""


def kind_or(default: str) -> Callable[[Any], Any]:
    """Finds the kind of a section in a union of several; where none is given, `default` is meant.

    A union over a field would know no default.
    """
    return lambda value: value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)


class Section(BaseModel):
    """Base of every part of a recipe: frozen, strict about keys, documented by attribute docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_no_flags(cls, value: Any, info: ValidationInfo) -> Any:
        """`steps: true` is a slip of the pen, not one step."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation in (int, float):
            raise ValueError(f"is {str(value).lower()}; write a number")
        return value
