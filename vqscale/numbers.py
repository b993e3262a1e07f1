"""What stands where a number belongs and looks like one, but was hardly meant as the one it would become."""

from __future__ import annotations

import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

_PADDED = re.compile(r"[-+]?0[0-9_]+")


def number_fault(value: object, annotation: Any) -> str:
    """Why a value is not taken for a number; empty where it may be, or where no number belongs.

    `steps: true` is a slip of the pen, not one step; and `010` is ten to people, but eight to YAML 1.1.

    Args:
        value: as it was read.
        annotation: type of the setting.
    """
    kinds = _kinds(annotation)
    if not kinds & {int, float} or bool in kinds:
        return ""
    if isinstance(value, bool):
        return f"is {str(value).lower()}; write a number"
    if isinstance(value, str) and str not in kinds and _PADDED.fullmatch(value):
        return f"is {value}; write a number without zeros before it"
    return ""


def _kinds(annotation: Any) -> set[Any]:
    """The types that a setting may have."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation}
