"""
What the library works out itself: functions of single values that are hard to get right.

The library would end a text at its first NUL and cannot take half a character; such texts are refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from cel_expr_python import cel

from app.workflows.expressions.cel.tree import environment
from app.workflows.expressions.cel.values import Budget, NoValue, int64, is_whole, told


def call(work: Budget, text: str, *values: Any) -> Any:
    """What `text` gives, an expression over `a` and, if there is a second value, the text `b`. Raises NoValue."""
    for value in values:
        if type(value) is int:
            int64(value)
        elif type(value) is str:
            work.spend(len(value) >> 6)
            if "\0" in value or not is_whole(value):
                raise NoValue("a text holds the character NUL, or half a character")
    try:
        kind = "dyn" if type(values[0]) in (str, int, float, bool) else told(values[0])
        found = _compiled(text, kind).eval(data=dict(zip("ab", values, strict=False)))
    except (RuntimeError, ValueError) as error:
        raise NoValue(_status(str(error))) from None
    if found.type().name() == "ERROR":
        raise NoValue(_status(found.value()))
    return found.value()


def _status(text: str) -> str:
    return re.sub(r"^[A-Z_]+: | \[[A-Z_]+\]$", "", text)[:200]


@lru_cache(maxsize=64)
def _compiled(text: str, kind: str) -> cel.Expression:
    return environment(frozenset({("a", kind), ("b", "string")})).compile(text)
