"""The label of a sample, by the rule that its manifest names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vqscale.data.bad import BadSample
from vqscale.data.tar import Sample
from vqscale.storage import Buffer

NO_LABEL = -1
"""A sample without a label."""


def stored_label(buffer: Buffer, sample: Sample, rule: str) -> int | str | None:
    """What a sample says of its class: a number, a word, or nothing.

    Args:
        buffer: the shard.
        sample: one of its samples.
        rule: `Manifest.label`.

    Raises:
        BadSample: `label`: its JSON or text cannot be read, or the value is neither number nor word.
    """
    try:
        value = _value(buffer, sample, rule)
    except (ValueError, AttributeError):
        raise BadSample("label") from None
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise BadSample("label")
    return None if value in (NO_LABEL, str(NO_LABEL)) else value


def label_number(value: int | str | None, classes: Sequence[str], numbers: Mapping[str, int]) -> int:
    """The label as a number; -1 for none.

    Args:
        value: from `stored_label`.
        classes: the manifest's classes; without any, every number is good, and no word is.
        numbers: number of each class by its word.

    Raises:
        BadSample: `label`: a word that is no class, or a number outside the classes.
    """
    if value is None:
        return NO_LABEL
    number = value
    if isinstance(value, str):  # classes may be called "7", "12", ...: a word is looked up before it is a number
        number = numbers[value] if value in numbers else _number(value)
    assert isinstance(number, int)
    if number < 0 or (classes and number >= len(classes)):
        raise BadSample("label")
    return number


def _value(buffer: Buffer, sample: Sample, rule: str) -> Any:
    fields = sample.fields
    if rule == "none":
        return None
    if rule.startswith("folder"):
        folders = sample.key.removeprefix("./").split("/")[:-1]
        depth = int(rule.partition(":")[2] or 0)
        return folders[depth] if len(folders) > depth else None
    if rule == "txt":
        return _text(buffer, fields["txt"]) if "txt" in fields else None
    if rule.startswith("json:"):
        return _json(buffer, fields, rule.removeprefix("json:"))
    if "cls" in fields:
        text = _text(buffer, fields["cls"])
        return int(text) if _number(text) >= 0 else text
    return _json(buffer, fields, "label") if rule == "" else None


def _json(buffer: Buffer, fields: Mapping[str, tuple[int, int]], key: str) -> Any:
    return json.loads(_text(buffer, fields["json"])).get(key) if "json" in fields else None


def _text(buffer: Buffer, span: tuple[int, int]) -> str:
    return buffer[span[0] : span[0] + span[1]].decode().strip()


def _number(text: str) -> int:
    """The number that a text is; -1 for anything else."""
    return int(text) if text.isascii() and text.isdigit() else -1
