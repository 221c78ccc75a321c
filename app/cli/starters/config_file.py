"""
A commented `arriero.toml`: every setting with its description and its default, each commented out.

The descriptions are those of the settings themselves. Pure: the settings in, a text out.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, SecretStr

from app.kernel.sections.section import Section, comments_of
from app.kernel.settings import Settings, shown, variable

#: The tables that most installations change, in this order; the others follow.
FIRST = ("pools", "catalog", "api", "http", "log", "runs")
#: Characters of a line.
_WIDTH = 100
_HEAD = """
Settings of Arriero. Each is commented out, with its default: to change one, remove the # before it.

This file is read from the directory in which a command is started, or else from the data directory. A variable of the
environment or an option of the command line comes before it. `arriero config show` prints each value and its origin.
"""


def text() -> str:
    """Return the text of the file, in TOML."""
    defaults = Settings.model_construct()
    sections = {name: value for name in Settings.model_fields if isinstance(value := getattr(defaults, name), Section)}
    order = [*FIRST, *(name for name in sections if name not in FIRST)]
    parts = [_comment(_HEAD), *_fields(defaults, "")]
    for name in order:
        section = sections[name]
        head = f"{_comment(_first_line(type(section)))}[{name}]\n"
        parts += [head, *_fields(section, f"{name}.")]
    return "\n".join(parts)


def _fields(section: BaseModel, prefix: str) -> Iterator[str]:
    """Yield each setting of a section, with its description."""
    comments = comments_of(type(section))
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            continue
        described = [comments.get(name), field.description]
        if value is None:
            described.append(f"Not set by default. As a variable: {variable(prefix + name)}")
            value = ""
        sentences = (f"{part[0].upper()}{part[1:].removesuffix('.')}." for part in described if part)
        yield f"{_comment(' '.join(sentences))}#{name} = {_toml(value)}\n"


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _comment(described: str) -> str:
    """Return a text as lines of comments."""
    paragraphs = (" ".join(part.split()) for part in described.strip().split("\n\n"))
    lines = (textwrap.wrap(part, _WIDTH - 3, break_long_words=False, break_on_hyphens=False) for part in paragraphs)
    return "\n#\n".join("\n".join(f"## {line}" for line in part) for part in lines).replace("\n#\n", "\n##\n") + "\n"


def _toml(value: Any) -> str:
    """Return a default as TOML, in the format that the settings read."""
    assert not isinstance(value, SecretStr), "no secret has a default"
    # A string, a number, a boolean or a list of them is written alike in JSON and TOML.
    return json.dumps(shown(value), ensure_ascii=False)
