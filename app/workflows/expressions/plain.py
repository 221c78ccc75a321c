"""
Plain values: what JSON can hold, and a store can keep.

A text, a truth value, null, an integer of 64 bits, a finite number; lists of these, and maps from texts to these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from app.workflows.expressions.cel.values import is_whole, named

#: Characters of a result as JSON, roughly.
MAX_RESULT = 4_000_000


class NotPlain(Exception):
    """The value cannot be written as JSON, or is too large to be."""


def require(value: Any, spend: Callable[[int], None]) -> None:
    """Raises NotPlain when the value is none, or longer than MAX_RESULT. Each part is first told to `spend`."""
    left = MAX_RESULT

    def see(value: Any) -> None:
        nonlocal left
        spend(1)
        kind = type(value)
        left -= len(value) + 2 if kind in (str, list, dict) else 5
        if left < 0:
            raise NotPlain(f"the result is longer than {MAX_RESULT} characters")
        if kind is list:
            for item in value:
                see(item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if type(key) is not str:
                    raise NotPlain(f"the result has the key {key!r}: keys of JSON are texts")
                left -= len(key) + 4
                see(item)
        elif kind is float:
            if not math.isfinite(value):
                raise NotPlain("the result is infinite or no number, which JSON cannot hold")
        elif kind is int:
            if not -(1 << 63) <= value < 1 << 63:
                raise NotPlain("the result holds a number beyond 64 bits")
        elif kind is str:
            if not is_whole(value):
                raise NotPlain("the result holds half a character (a lone surrogate), which UTF-8 cannot")
        elif kind not in (bool, type(None)):
            raise NotPlain(f"the result holds {named(value)}, which is no JSON")

    see(value)
