"""From YAML and `dotted.key=value` to a checked recipe; every fault becomes one line that names key and mend."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError

from vqscale.arguments import did_you_mean
from vqscale.config.plain import load_yaml
from vqscale.config.recipe import Recipe
from vqscale.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

_LONGEST = 60
"""Letters of a value that are quoted in a line."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply overrides, check everything that needs no data.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` texts; the value is read as YAML, list items by index
            (`tokenizer.levels.0.codes=256`).

    Raises:
        UserError: unreadable file, unknown key, wrong type, or settings that contradict each other.
    """
    return load_model(Recipe, path, overrides)


def load_model(model: type[Model], path: str | Path, overrides: Iterable[str] = ()) -> Model:
    """Read any typed YAML file (a recipe, a profile) with the errors that `load_recipe` promises."""
    tree, changes = _read_yaml(Path(path)), tuple(overrides)
    for text in changes:
        _apply_override(tree, text)
    return parse(model, tree, str(path), changes)


def parse(model: type[Model], tree: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Model:
    """Check a tree of plain values against a model.

    Args:
        model: the model.
        tree: the values.
        source: names the tree in errors.
        overrides: those that the tree has already; one that is at fault is named instead.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _explain(model, error, source, overrides) from None


def dump_yaml(model: BaseModel) -> str:
    """The resolved settings as YAML that `load_model` reads back to an equal model."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", where=str(path), mend="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-13-45
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"is not YAML ({getattr(error, 'problem', error)})", where=f"{path}{line}") from None
    if not isinstance(tree, dict):
        raise UserError("holds no settings", where=str(path), mend="write `key: value` lines")
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"{text!r} is no override", mend="write dotted.key=value")
    try:
        parsed = load_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2024-13-45
        raise UserError(f"the value {value!r} is not YAML", where=key, mend="quote it") from None
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = parsed
    else:
        node[last] = parsed


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, key)]
    child = node.setdefault(part, {})
    if child is None:
        child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise UserError(f"'{part}' is a single value and has no settings below it", where=key)
    return child


def _index(node: list[Any], part: str, key: str) -> int:
    if part.isascii() and part.isdigit() and int(part) < len(node):
        return int(part)
    raise UserError(f"'{part}' is no item of a list of {len(node)}", where=key, mend=f"use 0 to {len(node) - 1}")


def _explain(model: type[BaseModel], error: ValidationError, source: str, overrides: Sequence[str]) -> UserError:
    """The first fault as one line; the number of further ones behind it."""
    # Unknown keys first: a misspelt key that is required is also missing.
    faults = sorted(filter(_is_fault, error.errors(include_url=False)), key=lambda f: f["type"] != "extra_forbidden")
    fault = faults[0]
    more = f" ({len(faults) - 1} more below it)" if len(faults) > 1 else ""
    location, section = _follow(model, [str(part) for part in fault["loc"]])
    key = ".".join(location)
    source = _override_at_fault(overrides, location, fault) or source
    if fault["type"] == "extra_forbidden":
        return UserError(f"unknown key '{key}'{more}", where=source, mend=_valid_keys(section, location))
    if fault["type"] == "missing":
        return UserError(f"key '{key}' is missing{more}", where=source, mend=f"set {key}")
    if fault["type"] == "value_error":  # raised by a validator of ours, which names keys and mend itself
        message = str(fault["ctx"]["error"])
        return UserError(f"{key + ' ' if key else ''}{message}{more}", where=source)
    if fault["type"] == "union_tag_invalid":
        tag, tags = fault["ctx"]["tag"], fault["ctx"]["expected_tags"]
        return UserError(f"'{key}.kind' is '{tag}'{more}", where=source, mend=f"use {tags}")
    got = _short(fault["input"])
    return UserError(f"'{key}' is {got}{more}", where=source, mend=fault["msg"][:1].lower() + fault["msg"][1:])


def _override_at_fault(overrides: Sequence[str], location: list[str], fault: Any) -> str:
    """The last override that has set the key at fault, one above it, or one that the message names; else empty."""
    place = [*location, "kind"] if fault["type"] == "union_tag_invalid" else location
    said = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else ""
    for text in reversed(overrides):
        key = text.partition("=")[0]
        path = key.split(".")
        below = ".".join(path[len(location) :]) if path[: len(location)] == location else key
        named = re.search(rf"(?<![\w.])({re.escape(key)}|{re.escape(below)})(?![\w.])", said) if below else None
        if path == place[: len(path)] or named:
            return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return ""


def _is_fault(fault: Any) -> bool:
    """A list whose items are wrong is reported as too short besides."""
    return fault["type"] != "too_short" or len(fault["input"]) < fault["ctx"]["min_length"]


def _short(value: Any) -> str:
    text = f"{value!r} (a {type(value).__name__})"
    return text if len(text) <= _LONGEST else f"a {type(value).__name__}"


def _valid_keys(section: type[BaseModel], location: list[str]) -> str:
    """What could be meant by a key that a section does not have: one of its own, or one of that name further down."""
    (*above, key), keys = location, list(section.model_fields)
    prefix = "".join(f"{part}." for part in above)
    below = next((path for path in _paths(section) if path.endswith(f".{key}")), "")
    hint = f"did you mean '{prefix}{below}'? " if below else did_you_mean(key, keys, prefix)
    return f"{hint}valid keys: {', '.join(keys)}"


def _paths(section: type[BaseModel]) -> Iterator[str]:
    """Dotted names of all keys in the sections below one; of a list's items the first's."""
    for name, field in section.model_fields.items():
        for found in _sections_in(field.annotation):
            prefix = f"{name}.0" if found.listed else name
            for path in (*found.section.model_fields, *_paths(found.section)):
                yield f"{prefix}.{path}"


def _follow(model: type[BaseModel], location: list[str]) -> tuple[list[str], type[BaseModel]]:
    """A location as people write it, without the kinds that pydantic puts into it; and the section of its last key."""
    keys, section, found = [], model, [_Found("", model, False)]
    for part in location:
        kind = next((each for each in found if part and each.kind == part), None)
        if kind:
            found = [kind]
            continue
        keys.append(part)
        if not part.isdigit() and found:
            section = found[0].section
            field = section.model_fields.get(part)
            found = list(_sections_in(field.annotation)) if field else []
    return keys, section


class _Found(NamedTuple):
    """A section in an annotation: its kind, if there is a choice, and whether it is a list's item."""

    kind: str
    section: type[BaseModel]
    listed: bool


def _sections_in(annotation: Any, kind: str = "", listed: bool = False) -> Iterator[_Found]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield _Found(kind, annotation, listed)
    elif get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        tag = next((note.tag for note in notes if isinstance(note, Tag)), kind)
        yield from _sections_in(inner, tag, listed)
    elif get_origin(annotation) in (Union, UnionType, tuple, list):
        inside = listed or get_origin(annotation) in (tuple, list)
        for argument in get_args(annotation):
            yield from _sections_in(argument, kind, inside)
