"""
A document of the personal context: what a user, or a whole namespace, wants models to know.

A document is Markdown, with front matter if it needs any, or JSON. It is stored as it was written, and it is valid:
what it says about itself has a known shape, and it fits the limits.
For recall it is divided into sections: Markdown at its headings, JSON at its fields or items.

Nothing here reads a file, a clock or a database.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from app.kernel.errors import InvalidDefinition, InvalidInput, Problem
from app.workflows.language import source

#: The prefix of the ids of documents; 32 hexadecimal digits follow.
PREFIX = "doc_"
#: Most characters of a user, of a title and of a tag; most tags; most characters of front matter.
MAX_USER, MAX_TITLE, MAX_TAG, MAX_TAGS = 200, 200, 50, 20
_MAX_FRONT_MATTER = 10_000
#: Most sections of a document.
MAX_SECTIONS = 2_000

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
NAME_ACCEPTED = "letters, digits, '.', '_', '-'; at most 100, the first a letter or digit"
_NOT_A_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")
# What may close a heading is cut off afterwards: with it, the time of the pattern grew with the cube of a line.
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
_BLANK = " \t"
#: What front matter, and the top of a JSON object, can say about the document.
_ABOUT = ("title", "tags", "always")


class ContextKind(StrEnum):
    """What a document is about."""

    #: How the user wants to be answered. Such documents are in each prompt, unless they say otherwise.
    PREFERENCES = "preferences"
    PROJECTS = "projects"
    KNOWLEDGE = "knowledge"
    #: What happened.
    HISTORY = "history"


class ContextFormat(StrEnum):
    """How a document is written."""

    MARKDOWN = "markdown"
    JSON = "json"


class ContextSource(StrEnum):
    """Where a document comes from."""

    API = "api"
    #: A file of the watched folder; it changes only with it.
    FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class ContextSection:
    """A part of a document: what recall finds."""

    #: Its place, from 0.
    number: int
    #: The title of the document and the headings above, as `Title > Heading`.
    heading: str
    text: str


@dataclass(frozen=True, slots=True)
class NewContextDocument:
    """A valid document that is not stored yet; `parsed` makes it."""

    kind: ContextKind
    name: str
    format: ContextFormat
    title: str
    content: str
    tags: tuple[str, ...]
    #: It is in each prompt, whatever the prompt is about.
    always: bool


@dataclass(frozen=True, slots=True)
class ContextDocument(NewContextDocument):
    """A stored document."""

    id: str
    namespace: str
    #: None for a document of the whole namespace.
    user: str | None
    source: ContextSource
    #: Rises with each change, from 1.
    version: int
    created_at: datetime
    updated_at: datetime


def parsed(kind: ContextKind, name: str, format_: ContextFormat, content: str, max_bytes: int) -> NewContextDocument:
    """Return a document of a text. Raises InvalidInput with every problem."""
    problems = name_problems(name)
    size = len(content.encode(errors="replace"))
    if size > max_bytes:
        problems.append(
            Problem("content", f"it has {size} bytes", f"at most {max_bytes} (setting context.max_document_bytes)")
        )
        raise InvalidInput(problems, "document")
    if match := _NOT_A_TEXT.search(content):
        message = f"the character U+{ord(match[0]):04X} at {match.start()} is no text"
        problems.append(Problem("content", message, "text without control characters"))
    elif not content.strip():
        problems.append(Problem("content", "it is empty", "Markdown or JSON"))
    if problems:
        raise InvalidInput(problems, "document")
    about = _front_matter(content)[0] if format_ is ContextFormat.MARKDOWN else _about_of_json(content)
    if found := _about_problems(about):
        raise InvalidInput(found, "document")
    document = NewContextDocument(
        kind,
        name,
        format_,
        (about.get("title") or name).strip(),
        content,
        tuple(about.get("tags") or ()),
        about.get("always", kind is ContextKind.PREFERENCES),
    )
    if not any(True for _ in _sections(document)):
        raise InvalidInput([Problem("content", "it says nothing beside its title and tags", "a text")], "document")
    return document


def name_problems(name: str, where: str = "name") -> list[Problem]:
    """Return what is wrong with the name of a document."""
    return [] if _NAME.fullmatch(name) else [Problem(where, f"{name[:101]!r} is not a valid name", NAME_ACCEPTED)]


def user_problems(user: str, where: str = "user") -> list[Problem]:
    """Return what is wrong with the name of a user."""
    if 1 <= len(user) <= MAX_USER and not _NOT_A_TEXT.search(user):
        return []
    return [Problem(where, "this cannot be the name of a user", f"1 to {MAX_USER} characters")]


def sections(document: NewContextDocument) -> list[ContextSection]:
    """Return the parts of a document, each under its headings. The last one of too many has all the rest."""
    found = list(_sections(document))
    if len(found) > MAX_SECTIONS:
        rest = "\n\n".join(text for _, text in found[MAX_SECTIONS - 1 :])
        found = [*found[: MAX_SECTIONS - 1], (document.title, rest)]
    return [ContextSection(number, heading, text) for number, (heading, text) in enumerate(found)]


def body(document: NewContextDocument) -> str:
    """Return the text of a document for a prompt: without its front matter."""
    if document.format is ContextFormat.MARKDOWN:
        return _front_matter(document.content)[1].strip()
    return "\n".join(text for _, text in _sections(document))


def _sections(document: NewContextDocument) -> Iterator[tuple[str, str]]:
    """Yield headings and texts; a heading without a text is above others only."""
    if document.format is ContextFormat.JSON:
        yield from ((document.title, text) for text in _texts_of_json(document.content))
        return
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    fence = ""
    for line in [*_front_matter(document.content)[1].split("\n"), "# "]:
        marker = _FENCE.match(line)
        if marker is not None and (not fence or (marker[1].startswith(fence) and line.strip() == marker[1])):
            fence = "" if fence else marker[1]
        heading = None if fence or marker is not None else _HEADING.match(line)
        if heading is None and line != "# ":
            lines.append(line)
            continue
        if text := "\n".join(lines).strip():
            yield " > ".join([document.title, *(name for _, name in path if name != document.title)]), text
        lines = []
        if heading is not None:
            level = len(heading[1])
            path = [*((above, name) for above, name in path if above < level), (level, _title(heading[2]))]


def _title(text: str) -> str:
    """Return the text of a heading without the blanks and `#` that may close it."""
    return text.rstrip(_BLANK).rstrip("#").rstrip(_BLANK)


def _front_matter(content: str) -> tuple[dict[str, Any], str]:
    """Return the front matter of a Markdown text and the text after it. Raises InvalidInput."""
    text = content.replace("\r\n", "\n").removeprefix("\ufeff")
    if not text.startswith("---\n"):
        return {}, text
    end = text.find("\n---\n", 3, _MAX_FRONT_MATTER)
    if end < 0 and text.endswith("\n---") and len(text) <= _MAX_FRONT_MATTER:
        end = len(text) - 4
    if end < 0:
        message = f"the front matter has no end: a line '---' within {_MAX_FRONT_MATTER} characters"
        raise InvalidInput([Problem("content", message, line=1)], "document")
    inside = text[4 : end + 1]
    if not inside.strip():
        return {}, text[end + 5 :]
    try:
        about = source.read(inside, "yaml").data
    except InvalidDefinition as error:
        problems = [
            Problem(
                f"content{'.' if one.where else ''}{one.where}", one.message, one.accepted, one.line and one.line + 1
            )
            for one in error.problems
        ]
        raise InvalidInput(problems, "document") from None
    if not isinstance(about, dict):
        raise InvalidInput([Problem("content", "the front matter has no fields", ", ".join(_ABOUT), 2)], "document")
    unknown = [
        Problem(f"content.{name}", "there is no such field", ", ".join(_ABOUT)) for name in about if name not in _ABOUT
    ]
    if unknown:
        raise InvalidInput(unknown[:20], "document")
    return about, text[end + 5 :]


def _json(content: str) -> Any:
    """Return the data of a JSON document. Raises InvalidInput."""
    try:
        data = source.read(content.removeprefix("\ufeff"), "json").data
    except InvalidDefinition as error:
        problems = [Problem("content", one.message, one.accepted, one.line) for one in error.problems]
        raise InvalidInput(problems, "document") from None
    if not isinstance(data, dict | list):
        raise InvalidInput([Problem("content", "it is neither an object nor a list", "{…} or […]")], "document")
    return data


def _about_of_json(content: str) -> dict[str, Any]:
    data = _json(content)
    return {name: data[name] for name in _ABOUT if name in data} if isinstance(data, dict) else {}


def _texts_of_json(content: str) -> Iterator[str]:
    data = _json(content)
    if isinstance(data, list):
        yield from (shown for item in data if (shown := _shown(item)))
        return
    for name, value in data.items():
        if name not in _ABOUT and (shown := _shown(value)):
            yield f"{name}: {shown}"


def _shown(value: Any) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _about_problems(about: Mapping[str, Any]) -> list[Problem]:
    found = []
    title, tags, always = about.get("title"), about.get("tags"), about.get("always", False)
    if title is not None and (
        not isinstance(title, str) or not title.strip() or len(title) > MAX_TITLE or "\n" in title
    ):
        found.append(Problem("content.title", "this is no title", f"one line of 1 to {MAX_TITLE} characters"))
    is_list = isinstance(tags, list) and len(tags) <= MAX_TAGS
    if tags is not None and not (is_list and all(isinstance(one, str) and 1 <= len(one) <= MAX_TAG for one in tags)):
        found.append(
            Problem(
                "content.tags", "these are no tags", f"a list of at most {MAX_TAGS} texts of 1 to {MAX_TAG} characters"
            )
        )
    if not isinstance(always, bool):
        found.append(Problem("content.always", f"{str(always)[:40]!r} is neither true nor false", "true, false"))
    return found
