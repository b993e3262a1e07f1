"""The docstrings below the attributes of a class, read from its source: what settings are described by."""

from __future__ import annotations

import ast
import inspect


def described(own: type, base: type) -> dict[str, str]:
    """Attribute → the docstring below it, of a class and those that it comes from, but for `base`.

    pydantic would read them whenever a class is imported (`use_attribute_docstrings`), which is a third of what
    `vqscale submit` takes; this waits until they are asked for.
    """
    texts: dict[str, str] = {}
    for one in reversed(own.__mro__[: own.__mro__.index(base)]):
        body = ast.parse(inspect.getsource(one)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(below, ast.Expr):
                continue
            if isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = inspect.cleandoc(str(below.value.value))
    return texts
