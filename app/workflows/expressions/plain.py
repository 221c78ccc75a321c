"""
Plain values: the results of expressions that JSON can represent and the database can store.

A plain value is a string, a boolean, null, a 64-bit integer or a finite number, a list of plain values, or a map from
strings to plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from app.json_schema.values import is_encodable
from app.workflows.expressions.cel.values import describe_type

#: Maximum characters of a result as JSON, approximately.
MAX_RESULT = 4_000_000


class NotPlain(Exception):
    """The value has no JSON form or is too large."""


def require(value: Any, spend: Callable[[int], None]) -> None:
    """
    Check that a value is plain and at most MAX_RESULT characters long; raise NotPlain otherwise.

    Calls `spend(1)` for each part before it is checked.
    """
    left = MAX_RESULT

    def visit(value: Any) -> None:
        nonlocal left
        spend(1)
        kind = type(value)
        left -= len(value) + 2 if kind in (str, list, dict) else 5
        if left < 0:
            raise NotPlain(f"the result is longer than {MAX_RESULT} characters")
        if kind is list:
            for item in value:
                visit(item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if type(key) is not str:
                    raise NotPlain(f"the result has the key {key!r}: JSON keys must be strings")
                left -= len(key) + 4
                visit(item)
        elif kind is float:
            if not math.isfinite(value):
                raise NotPlain("the result contains infinity or NaN, which JSON cannot represent")
        elif kind is int:
            if not -(1 << 63) <= value < 1 << 63:
                raise NotPlain("the result contains an integer beyond 64 bits")
        elif kind is str:
            if not is_encodable(value):
                raise NotPlain("the result contains a lone surrogate, which UTF-8 cannot encode")
        elif kind not in (bool, type(None)):
            raise NotPlain(f"the result contains {describe_type(value)}, which JSON cannot represent")

    visit(value)
