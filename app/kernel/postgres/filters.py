"""The WHERE clause of lists with filters that may be absent."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any


def where(given: MutableMapping[str, Any], conditions: Mapping[str, tuple[str, Any]]) -> str:
    """
    Return `WHERE a AND b` of the conditions whose value is not None, empty without any, and add their values.

    `conditions` has the condition and the value of each parameter by its name; `given` are the statement's parameters.
    """
    chosen = []
    for name, (condition, value) in conditions.items():
        if value is not None:
            chosen.append(condition)
            given[name] = value
    return f"WHERE {' AND '.join(chosen)}" if chosen else ""
