"""
The catalogue: which models can be served, where each one's file comes from, and with which numbers.

A catalogue is a TOML text of `[[models]]` tables. A wrong entry is refused with every problem in it: the key's path,
its line, what is wrong and what would be accepted. A key that nobody reads is refused too.
Of several catalogues the later one wins: an entry of the same name replaces the earlier entry whole.
Every name has one slug, used for queues and workers, and no two models of a catalogue share one.

Nothing here opens a file: the caller passes the text and says where it came from.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.catalog.engine_options import Conflicts, EngineEntry, Rope, SourcedAdapter
from app.catalog.model import KvTypes, Model, PromptProfile
from app.catalog.pool_options import Pooling, ReserveOptions, Simulated
from app.catalog.source import SOURCES, PackageFile, is_source_tag
from app.kernel.errors import InvalidCatalog, InvalidInput, NotFound, Problem

#: Key of the list of entries; the only key at the top of a catalogue.
_ENTRIES = "models"
_HEADER = re.compile(r"^\s*\[\[\s*models\s*\]\]")
_TOML_PLACE = re.compile(r"\(at line (\d+), column \d+\)|\(at end of document\)")


@dataclass(frozen=True, slots=True)
class Catalog:
    """Models by name, in the order of their entries, each with the text that it came from."""

    models: tuple[Model, ...] = ()
    #: Name of a model to the `origin` that `parse` was given.
    origins: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Model]:
        return iter(self.models)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(model.name for model in self.models)

    def get(self, name: str) -> Model:
        """The model of that name. Raises NotFound, which lists the names that there are."""
        if (model := self.find(name)) is None:
            raise NotFound("model", name, self.names)
        return model

    def find(self, name: str) -> Model | None:
        """The model of that name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def with_use_case(self, use_case: str) -> tuple[Model, ...]:
        """The models that are entered for that use, in order."""
        return tuple(model for model in self.models if use_case in model.use_cases)


def parse(text: str, origin: str) -> Catalog:
    """
    The catalogue that `text` writes down.

    `origin` is the path of its file, or another name for it. A relative `path` of a model counts from that file's
    folder.

    Raises InvalidCatalog with every problem found, and `origin` in its message.
    """
    what = f"model catalogue {origin}"
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidCatalog([_not_toml(str(error), text)], what) from None

    lines = _Lines(text)
    problems = [
        Problem(key, "there is no such key at the top of a catalogue", f"{_ENTRIES} (as [[{_ENTRIES}]] tables)")
        for key in document
        if key != _ENTRIES
    ]
    entries = document.get(_ENTRIES, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append(Problem(_ENTRIES, "this is no list of tables", f"[[{_ENTRIES}]] tables"))
        entries = []

    models: list[tuple[int, Model]] = []
    for index, entry in enumerate(entries):
        try:
            models.append((index, Model.model_validate(entry, context={"origin": origin})))
        except ValidationError as error:
            items = [item for item in error.errors() if not _follows_from_another(item, error.errors())]
            problems.extend(problem for item in items for problem in _problems(item, index, lines))
    problems.extend(_clashes(models, lines))
    if problems:
        raise InvalidCatalog(problems, what)
    return Catalog(tuple(model for _, model in models), {model.name: origin for _, model in models})


def merge(catalogs: Iterable[Catalog]) -> Catalog:
    """
    One catalogue of all: of two entries with one name the later one stays, in the place of the earlier.

    Raises InvalidCatalog when two different names come to the same slug.
    """
    models: dict[str, Model] = {}
    origins: dict[str, str] = {}
    for catalog in catalogs:
        for model in catalog:
            models[model.name] = model
            origins[model.name] = catalog.origins.get(model.name, "")
    owners: dict[str, str] = {}
    problems = []
    for name, model in models.items():
        if (owner := owners.setdefault(model.slug, name)) != name:
            message = f"comes to the slug {model.slug!r} ({origins[name]}), as {owner} does ({origins[owner]})"
            problems.append(Problem(name, message, "a name with a slug of its own"))
    if problems:
        raise InvalidCatalog(problems, "model catalogues")
    return Catalog(tuple(models.values()), origins)


def changed(model: Model, values: Mapping[str, Any], names: Mapping[str, str]) -> Model:
    """
    The model with other values, by the dotted keys of its entry.

    Raises InvalidInput with every problem; `names` has what the caller calls a key.
    """
    merged = model.model_dump()
    for key, value in values.items():
        table, _, inner = key.rpartition(".")
        (merged[table] if table else merged)[inner] = value
    try:
        return Model.model_validate(merged)
    except ValidationError as error:
        problems = [problem for item in error.errors() for problem in _problems(item, 0, _Lines(""))]
    keys = [problem.where.removeprefix(f"{_ENTRIES}[0].") for problem in problems]
    named = [replace(problem, where=names.get(key, key)) for key, problem in zip(keys, problems, strict=True)]
    raise InvalidInput(named, f"options of {model.name}")


def to_toml(models: Iterable[Model]) -> str:
    """The text from which `parse` makes these models; what has its default value is left out."""
    return "\n".join(_table(model) for model in models)


def _table(model: Model) -> str:
    given = model.model_dump(mode="json", exclude_defaults=True)
    tables = {key: given.pop(key, {}) for key in ("prompt", "engine")}
    given["source"] = _source(given.pop("source"))
    lines = [f"[[{_ENTRIES}]]", *(f"{key} = {_toml(value)}" for key, value in given.items() if value != {})]
    for name, values in tables.items():
        if values:
            lines += ["", f"[{_ENTRIES}.{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _source(given: Mapping[str, Any]) -> dict[str, Any]:
    """What names the file first; what checks it last, and without a list around one value."""
    checks = {key: value[0] if len(value) == 1 else value for key, value in given.items() if key in {"size", "sha256"}}
    return {key: value for key, value in given.items() if key not in checks} | checks


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():  # a JSON text is a TOML text, but for the one control character that JSON leaves as it is
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            return "{ " + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + " }"
        case list() | tuple():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _clashes(models: Sequence[tuple[int, Model]], lines: _Lines) -> Iterator[Problem]:
    names: dict[str, int] = {}
    slugs: dict[str, tuple[int, str]] = {}
    for index, model in models:
        where, line = f"{_ENTRIES}[{index}].name", lines.find(index, "name")
        if (first := names.setdefault(model.name, index)) != index:
            yield Problem(where, f"{model.name!r} is the name of {_ENTRIES}[{first}] already", "each name once", line)
            continue
        owner_index, owner = slugs.setdefault(model.slug, (index, model.name))
        if owner_index != index:
            message = f"{model.name!r} comes to the slug {model.slug!r}, as {owner!r} ({_ENTRIES}[{owner_index}]) does"
            yield Problem(where, message, "a name with a slug of its own", line)


def _follows_from_another(item: ErrorDetails, items: Sequence[ErrorDetails]) -> bool:
    """Whether a list is called too short only because its items were refused one by one."""
    loc = item["loc"]
    return item["type"] == "too_short" and any(len(o["loc"]) > len(loc) and o["loc"][: len(loc)] == loc for o in items)


def _not_toml(message: str, text: str) -> Problem:
    place = _TOML_PLACE.search(message)
    line = text.count("\n") + 1 if place and place[1] is None else int(place[1]) if place else None
    reason = _TOML_PLACE.sub("", message).strip()
    return Problem("", f"this is no TOML: {reason[:1].lower()}{reason[1:]}", line=line)


def _problems(item: ErrorDetails, index: int, lines: _Lines) -> Iterator[Problem]:
    error = item.get("ctx", {}).get("error")
    if not isinstance(error, Conflicts):
        yield _problem(item, index, lines)
        return
    for where, message, accepted in error.found:
        yield Problem(f"{_ENTRIES}[{index}].{where}", message, accepted, lines.find(index, *where.split(".")))


def _problem(item: ErrorDetails, index: int, lines: _Lines) -> Problem:
    path = [part for part in item["loc"] if not is_source_tag(part)]
    where = f"{_ENTRIES}[{index}]" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    written = path[:-1] if item["type"] == "missing" else path
    line = lines.find(index, *(part for part in written if isinstance(part, str)))
    owner = _owner(item["loc"])
    key = str(path[-1]) if path else ""
    known = tuple(owner.model_fields)

    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, n=1)
        return Problem(where, "there is no such key", f"did you mean {close[0]}?" if close else ", ".join(known), line)
    named = next((part for part in reversed(path) if isinstance(part, str)), "")
    accepted = (owner.model_fields[named].description or "") if named in known else ""
    if item["type"] == "missing":
        return Problem(where, "is missing", accepted, line)
    if item["type"] == "value_error":
        of_source = item["loc"] and is_source_tag(item["loc"][-1])  # its own message says what is accepted
        return Problem(where, item["msg"].removeprefix("Value error, "), "" if of_source else accepted, line)
    if item["type"] == "source":
        return Problem(where, item["msg"], line=line)
    message = "is not accepted" if accepted else item["msg"][:1].lower() + item["msg"][1:]
    return Problem(where, f"{item['input']!r} {message}", accepted, line)


def _owner(loc: Sequence[int | str]) -> type[BaseModel]:
    """The class whose field the error names, for its descriptions and its close matches."""
    owner: type[BaseModel] = Model
    inner: Mapping[str, type[BaseModel]] = {
        "kv": KvTypes, "prompt": PromptProfile, "chunks": PackageFile, "engine": EngineEntry, "rope": Rope,
        "loras": SourcedAdapter, "pools": Pooling, "reserve": ReserveOptions, "simulated": Simulated,
    }  # fmt: skip
    for part in loc[:-1]:
        owner = SOURCES.get(str(part)) or inner.get(str(part)) or owner
    return owner


class _Lines:
    """Where in the text an entry begins, and where in it a key is written; what cannot be told is None."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self._starts = [number for number, line in enumerate(self._lines) if _HEADER.match(line)]

    def find(self, index: int, *keys: str) -> int | None:
        """The line of the innermost of nested keys that is written once; else that where the entry begins."""
        if index >= len(self._starts):
            return None
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self._starts) else len(self._lines)
        for key in map(re.escape, keys):
            writes = re.compile(rf"^\s*(?:{key}[\s.=]|\[+\s*models\s*\.\s*(?:\w+\s*\.\s*)?{key}\s*\])")
            found = [number for number in range(start, end) if writes.match(self._lines[number])]
            if len(found) == 1:
                start = found[0]
        return start + 1
