"""
A section of the settings: a table of `arriero.toml`, validated when it is created.

A field of the type `Annotated[…, CHANGEABLE]` may change while the processes run: see `app/kernel/live/`.

`comments_of` returns the `#:` comments of the fields of a type, which describe them in schemas and in commented files.
"""

from __future__ import annotations

import inspect
import re
import sys
from enum import StrEnum
from functools import lru_cache

from pydantic import BaseModel, ConfigDict


class Changeability(StrEnum):
    """Whether a setting may change while the processes run."""

    CHANGEABLE = "changeable"


#: Marks a field whose value may change while the processes run.
CHANGEABLE = Changeability.CHANGEABLE


class Section(BaseModel):
    """A table of `arriero.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
_FIELD = re.compile(r"(?P<comment>(?:^    #:.*\n)+)^    (?P<name>\w+):", re.MULTILINE)


def comments_of(cls: type[BaseModel]) -> dict[str, str]:
    """Return the `#:` comment above each field of a type and of its base types."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _comments_of_module(base.__module__).get(base.__name__, {})
    return found


@lru_cache
def _comments_of_module(name: str) -> dict[str, dict[str, str]]:
    """Return the comments of the fields of each type of a module."""
    _, *parts = _CLASS.split(inspect.getsource(sys.modules[name]))
    found: dict[str, dict[str, str]] = {}
    for type_name, body in zip(parts[::2], parts[1::2], strict=True):
        for match in _FIELD.finditer(body):
            lines = (line.strip().removeprefix("#:").strip() for line in match["comment"].splitlines())
            found.setdefault(type_name, {})[match["name"]] = " ".join(lines).removesuffix(".")
    return found
