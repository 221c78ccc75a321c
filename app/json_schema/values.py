"""JSON values in validation: their types, excerpts for messages, and deviations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Maximum characters of a value in a message.
MAX_EXCERPT = 200

Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Deviation:
    """One deviation of a value from its schema."""

    #: The path in the value.
    path: Path
    message: str

    @property
    def where(self) -> str:
        """The path as text: `.orders[3].id`; empty for the whole value."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)


def excerpt(value: Any) -> str:
    """Returns the beginning of a value's `repr`. The cost does not grow with the size of the value."""
    text = _excerpt(value, MAX_EXCERPT)
    return text if len(text) <= MAX_EXCERPT else f"{text[: MAX_EXCERPT - 1]}…"


def _excerpt(value: Any, room: int) -> str:
    if isinstance(value, str):
        return repr(value[:room])
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * MAX_EXCERPT:
        return "a number of many digits"
    if not isinstance(value, Mapping | list | tuple):
        return repr(value)
    parts: list[str] = []
    items: Iterable[Any] = value.items() if isinstance(value, Mapping) else value
    for item in items:
        if room <= 0:
            break
        if isinstance(value, Mapping):
            key = _excerpt(item[0], room)
            part = f"{key}: {_excerpt(item[1], room - len(key))}"
        else:
            part = _excerpt(item, room)
        parts.append(part)
        room -= len(part) + 2
    whole = ", ".join(parts)
    return f"{{{whole}}}" if isinstance(value, Mapping) else f"[{whole}]"


def type_of(value: Any) -> str | None:
    """Returns the JSON Schema type of a value; None for null and for values that are not JSON."""
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, Mapping):
        return "object"
    return "array" if isinstance(value, list | tuple) else None


def is_type(value: Any, name: str) -> bool:
    """Returns whether a value has the named type: 1.0 is an integer."""
    if name == "integer":
        return type_of(value) == "number" and (isinstance(value, int) or value.is_integer())
    return value is None if name == "null" else type_of(value) == name


def is_encodable(text: str) -> bool:
    """Returns whether a text can be encoded as UTF-8, which excludes lone surrogates."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
