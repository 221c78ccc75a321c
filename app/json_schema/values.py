"""Values of JSON, as schemas see them: their types, their beginnings for messages, and where they deviate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Characters of a value that a message shows.
SHOWN = 200

Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Deviation:
    """One thing in which a value does not conform."""

    #: Where in the value.
    path: Path
    message: str

    @property
    def where(self) -> str:
        """The path as text: `.orders[3].id`; empty for the whole value."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)


def shown(value: Any) -> str:
    """The beginning of a value, as Python writes it. The cost does not grow with the value."""
    text = _beginning(value, SHOWN)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _beginning(value: Any, room: int) -> str:
    if isinstance(value, str):
        return repr(value[:room])
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * SHOWN:
        return "a number of many digits"
    if not isinstance(value, Mapping | list | tuple):
        return repr(value)
    parts: list[str] = []
    items: Iterable[Any] = value.items() if isinstance(value, Mapping) else value
    for item in items:
        if room <= 0:
            break
        if isinstance(value, Mapping):
            key = _beginning(item[0], room)
            part = f"{key}: {_beginning(item[1], room - len(key))}"
        else:
            part = _beginning(item, room)
        parts.append(part)
        room -= len(part) + 2
    whole = ", ".join(parts)
    return f"{{{whole}}}" if isinstance(value, Mapping) else f"[{whole}]"


def kind_of(value: Any) -> str | None:
    """The type of a value in JSON Schema; None for null, and for what is no JSON."""
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
    """Whether a value has the type of that name: 1.0 is an integer."""
    if name == "integer":
        return kind_of(value) == "number" and (isinstance(value, int) or value.is_integer())
    return value is None if name == "null" else kind_of(value) == name


def is_whole(text: str) -> bool:
    """Whether a text can be written in UTF-8: no half of a character (a lone surrogate) is in it."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
