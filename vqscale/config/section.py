"""What all parts of a recipe are made of: the strict base, and the kinds of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationInfo, field_validator
from pydantic.json_schema import JsonSchemaValue

from vqscale.docstrings import described
from vqscale.numbers import number_fault

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

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_meant(cls, value: Any, info: ValidationInfo) -> Any:
        if fault := number_fault(value, cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(fault)
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Settings with their descriptions."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, text in described(cls, Section).items():
            if name in properties:
                properties[name]["description"] = text
        return schema
