"""What all parts of a profile are made of: the strict base."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationInfo, field_validator
from pydantic.json_schema import JsonSchemaValue

from vqscale.docstrings import described
from vqscale.numbers import number_fault


class Section(BaseModel):
    """Base of every part of a profile: frozen, strict about keys and numbers, as a recipe is."""

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
