"""What all parts of a recipe are made of: the strict base, and the kinds of numbers."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationInfo, field_validator
from pydantic.json_schema import JsonSchemaValue

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
        """Settings with their descriptions.

        pydantic would read them from the source whenever a section is imported (`use_attribute_docstrings`), which is
        a third of what `vqscale submit` takes.
        """
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, text in _described(cls).items():
            if name in properties:
                properties[name]["description"] = text
        return schema


def _described(section: type[BaseModel]) -> dict[str, str]:
    """Attribute → the docstring below it, of a class and those that it comes from."""
    texts: dict[str, str] = {}
    for own in reversed(section.__mro__[: section.__mro__.index(Section)]):
        body = ast.parse(inspect.getsource(own)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = inspect.cleandoc(str(below.value.value))
    return texts
