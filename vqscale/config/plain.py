"""YAML without its traps: no key twice, and no numbers that only YAML 1.1 knows."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))\Z"
    r"|\.(?:nan|NaN|NAN)\Z"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's, but that `010` (eight) and `1:30` (ninety) stay texts, and a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Before merge keys (`<<`) are resolved, which may be overridden."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


_NUMBERS = {"tag:yaml.org,2002:int": _INT, "tag:yaml.org,2002:float": _FLOAT}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """What a text says.

    Raises:
        yaml.YAMLError: it is no YAML, or a key stands twice in a mapping.
        ValueError: a date that there is not.
        RecursionError: it is nested too deeply.
    """
    return yaml.load(text, _Loader)
