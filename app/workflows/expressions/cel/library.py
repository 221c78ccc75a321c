"""
Functions of single values that are delegated to Google's CEL library.

The library cuts a string at its first NUL and fails on lone surrogates; strings that contain either are rejected.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from cel_expr_python import cel

from app.json_schema.values import is_encodable
from app.workflows.expressions.cel.tree import environment
from app.workflows.expressions.cel.values import Budget, EvaluationError, int64, type_name


def call(budget: Budget, text: str, *values: Any) -> Any:
    """
    Return the value of the expression `text` over `a` and, when there is a second value, the string `b`.

    Raises EvaluationError.
    """
    for value in values:
        if type(value) is int:
            int64(value)
        elif type(value) is str:
            budget.spend(len(value) >> 6)
            if "\0" in value or not is_encodable(value):
                raise EvaluationError("a string contains NUL or a lone surrogate")
    try:
        kind = "dyn" if type(values[0]) in (str, int, float, bool) else type_name(values[0])
        found = _compiled(text, kind).eval(data=dict(zip("ab", values, strict=False)))
    except (RuntimeError, ValueError) as error:
        raise EvaluationError(_status(str(error))) from None
    if found.type().name() == "ERROR":
        raise EvaluationError(_status(found.value()))
    return found.value()


def _status(text: str) -> str:
    return re.sub(r"^[A-Z_]+: | \[[A-Z_]+\]$", "", text)[:200]


@lru_cache(maxsize=64)
def _compiled(text: str, kind: str) -> cel.Expression:
    return environment(frozenset({("a", kind), ("b", "string")})).compile(text)
