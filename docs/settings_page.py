"""A page of settings as Markdown, from their types: every one with its type, default and description.

`make_recipes.py` and `make_profiles.py` write theirs with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def settings_page(root: type[BaseModel], head: str, title: str, sections: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        root: the type that holds all others.
        head: what stands before the tables.
        title: heading of the settings of `root` itself.
        sections: dotted name of each section → its type, in the order of the page; empty for `root`. Of sections with
            one name the kind follows, `prior.networks.N: uniform`.
    """
    schema = root.model_json_schema()
    types = {root.__name__: schema, **schema["$defs"]}
    missing = set(types) - set(sections.values())
    if missing:
        raise SystemExit(f"give the section {', '.join(sorted(missing))} of {root.__name__} a place in SECTIONS")
    parts = [head]
    shown: dict[str, str] = {}
    for name, kind in sections.items():
        parts.append(f"## {f'`{name}`' if name else title}\n")
        parts.append(f"{types[kind]['description']}\n")
        if kind in shown:
            parts.append(f"The settings are those of [`{shown[kind]}`](#{_anchor(shown[kind])}).\n")
            continue
        shown[kind] = name
        parts.append(_table(types[kind], name, sections))
    return "\n".join(parts)


def _table(section: dict[str, Any], name: str, sections: Mapping[str, str]) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for key, field in section["properties"].items():
        default = "" if key in required else _default(field["default"])
        path = f"{name.partition(': ')[0]}.{key}".strip(".")
        cells = (f"`{key}`", _type(field, path, sections), default, " ".join(field["description"].split()))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _type(field: dict[str, Any], name: str, sections: Mapping[str, str]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option, name, sections) for option in field["anyOf"])
    if "oneOf" in field:
        kinds = [section for section in sections if section.startswith(f"{name}: ")]
        return "section: " + " or ".join(f"[{kind.partition(': ')[2]}](#{_anchor(kind)})" for kind in kinds)
    if "$ref" in field:
        kind = field["$ref"].rpartition("/")[2]
        found = (section for section, its in sections.items() if section.partition(": ")[0] == name and its == kind)
        return f"[section](#{_anchor(next(found))})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return _array(field, name, sections)
    if field["type"] == "object":
        return _mapping(field, name, sections)
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "nothing"}
    return " ".join([words[field["type"]], *_limits(field)])


def _array(field: dict[str, Any], name: str, sections: Mapping[str, str]) -> str:
    if "prefixItems" in field:
        return f"list of {len(field['prefixItems'])}: {_type(field['prefixItems'][0], name, sections)}"
    item = _type(field["items"], f"{name}.N", sections)
    if "minItems" not in field:
        return f"list: {item}"
    if "maxItems" not in field:
        return f"list of {field['minItems']} or more: {item}"
    return f"list of {field['minItems']} to {field['maxItems']}: {item}"


def _mapping(field: dict[str, Any], name: str, sections: Mapping[str, str]) -> str:
    """Free names, each with a value; names that have to fit a pattern are `patternProperties`."""
    patterns = list(field.get("patternProperties", {}).values())
    return f"name: {_type(patterns[0] if patterns else field['additionalProperties'], f'{name}.NAME', sections)}, ..."


def _limits(field: dict[str, Any]) -> list[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_number(field[key])}" for key, sign in signs.items() if key in field]
    return [", ".join(limits)] if limits else []


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if math.isfinite(value) else str(value)


def _default(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "as below" if value else "none"
    return f"`{json.dumps(value)}`"


def _anchor(name: str) -> str:
    """Where a heading `name` is on a rendered page."""
    return name.lower().replace(".", "").replace(":", "").replace(" ", "-")
