"""
The model catalogue: the models that can be served, the source of each model's file, and its serving options.

A catalogue is a TOML text of `[[models]]` tables. An invalid entry is rejected with every problem in it: the path and
line of the key, what is wrong, and what would be accepted. Unknown keys are rejected.
When catalogues are merged, the later one wins: its entry replaces an earlier entry of the same name completely.
Each name has one slug, which queues and workers use. Two models of a catalogue never share a slug.

Nothing here opens a file: the caller passes the text and its origin.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app.catalog.engine_options import ConflictingOptions, EngineEntry, Rope, SourcedAdapter, SourcedDraft
from app.catalog.model import KvTypes, Model, ProjectorEntry, PromptProfile
from app.catalog.pool_options import PoolOptions, ReserveOptions, SimulatedOptions
from app.catalog.profiles.family import RecommendedSampling
from app.catalog.serving import selection_options
from app.catalog.serving.remote_options import RemoteEntry
from app.catalog.serving.selection_options import FallbackOptions, Rating
from app.catalog.source import SOURCES, PackageFile, ServerSource, is_source_tag
from app.kernel.errors import InvalidCatalog, InvalidInput, NotFound, Problem

#: Key of the list of entries; the only top-level key of a catalogue.
_MODELS_KEY = "models"
_HEADER = re.compile(r"^\s*\[\[\s*models\s*\]\]")
_TOML_POSITION = re.compile(r"\(at line (\d+), column \d+\)|\(at end of document\)")


@dataclass(frozen=True, slots=True)
class Catalog:
    """Models in the order of their entries, each with the origin of its entry."""

    models: tuple[Model, ...] = ()
    #: Maps the name of a model to the `origin` that was passed to `parse`.
    origins: Mapping[str, str] = field(default_factory=dict)
    #: Models that are not served for a while.
    paused: frozenset[str] = frozenset()
    #: By model, those to which its requests go for a while.
    diverted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Model]:
        return iter(self.models)

    def current(self) -> Catalog:
        """Returns this catalogue, which never changes."""
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """All model names, in order."""
        return tuple(model.name for model in self.models)

    def get(self, name: str) -> Model:
        """Returns the model of that name. Raises NotFound, which lists the known names."""
        if (model := self.find(name)) is None:
            raise NotFound("model", name, self.names)
        return model

    def find(self, name: str) -> Model | None:
        """Returns the model of that name, or None."""
        return next((model for model in self.models if model.name == name), None)

    def resolve(self, reference: str) -> Model | None:
        """Returns the model of that name or alias, or None."""
        return next((model for model in self.models if reference == model.name or reference in model.aliases), None)

    def chain(self, name: str) -> tuple[Model, ...]:
        """Returns the models that are tried for a request to the model `name`, in order. Raises NotFound."""
        self.get(name)
        names = selection_options.chain(name, lambda one: self._fallbacks(one))
        if name in self.diverted:
            names = tuple(dict.fromkeys([*self.diverted[name], *names[1:], name]))
        return tuple(map(self.get, names))

    def is_rerouted(self, name: str) -> bool:
        """Whether other models than this one are tried for requests to it."""
        return name in self.diverted or name in self.paused or bool(self.get(name).fallback.models)

    def _fallbacks(self, name: str) -> tuple[str, ...]:
        found = (self.resolve(other) for other in self.get(name).fallback.models)
        return tuple(model.name for model in found if model is not None)

    def with_use_case(self, use_case: str) -> tuple[Model, ...]:
        """Returns the models with that use case, in order."""
        return tuple(model for model in self.models if use_case in model.use_cases)


class CatalogSource(Protocol):
    """A catalogue that may change from one moment to the next."""

    def current(self) -> Catalog:
        """Returns the catalogue of this moment."""
        ...


def parse(text: str, origin: str) -> Catalog:
    """
    Parses the TOML text of a catalogue.

    `origin` is the path of its file, or another name for it. A relative `path` of a model is relative to the folder of
    that file.

    Raises InvalidCatalog with every problem found; its message names `origin`.
    """
    what = f"model catalogue {origin}"
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidCatalog([_syntax_problem(str(error), text)], what) from None

    lines = _SourceLines(text)
    problems = [
        Problem(key, "there is no such top-level key", f"{_MODELS_KEY} (as [[{_MODELS_KEY}]] tables)")
        for key in document
        if key != _MODELS_KEY
    ]
    entries = document.get(_MODELS_KEY, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append(Problem(_MODELS_KEY, "this is not a list of tables", f"[[{_MODELS_KEY}]] tables"))
        entries = []

    models: list[tuple[int, Model]] = []
    for index, entry in enumerate(entries):
        try:
            models.append((index, Model.model_validate(entry, context={"origin": origin})))
        except ValidationError as error:
            items = [item for item in error.errors() if not _follows_from_another(item, error.errors())]
            problems.extend(problem for item in items for problem in _problems(item, index, lines))
    problems.extend(_duplicates(models, lines))
    if problems:
        raise InvalidCatalog(problems, what)
    return Catalog(tuple(model for _, model in models), {model.name: origin for _, model in models})


def merge(catalogs: Iterable[Catalog]) -> Catalog:
    """
    Merges catalogues into one. Of two entries with the same name the later one is kept, at the position of the earlier.

    Raises InvalidCatalog when two different names have the same slug.
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
            message = f"has the slug {model.slug!r} ({origins[name]}), and so has {owner} ({origins[owner]})"
            problems.append(Problem(name, message, "a name with a unique slug"))
    merged = Catalog(tuple(models.values()), origins)
    problems += _wrong_references(merged)
    if problems:
        raise InvalidCatalog(problems, "model catalogues")
    return merged


def _wrong_references(catalog: Catalog) -> Iterator[Problem]:
    """The problems of aliases and fallbacks, which only the whole catalogue shows."""
    names = set(catalog.names)
    owners: dict[str, str] = {}
    for model in catalog:
        origin = catalog.origins.get(model.name, "")
        for alias in model.aliases:
            if alias in names:
                message = f"the alias {alias!r} ({origin}) is the name of another model"
                yield Problem(f"{model.name}: aliases", message, "an alias that is no name")
            elif (owner := owners.setdefault(alias, model.name)) != model.name:
                yield Problem(
                    f"{model.name}: aliases", f"{alias!r} ({origin}) is an alias of {owner}", "each alias once"
                )
    fallbacks: dict[str, tuple[str, ...]] = {}
    for model in catalog:
        found = {other: catalog.resolve(other) for other in model.fallback.models}
        for other in (other for other, known in found.items() if known is None):
            close = difflib.get_close_matches(other, catalog.names, n=1)
            accepted = f"did you mean {close[0]}?" if close else "a name or an alias of the catalogue"
            message = f"the catalogue has no model {other!r} ({catalog.origins.get(model.name, '')})"
            yield Problem(f"{model.name}: fallback.models", message, accepted)
        fallbacks[model.name] = tuple(known.name for known in found.values() if known is not None)
    for loop in selection_options.loops(fallbacks):
        message = f"the fallbacks are a loop: {' → '.join(loop)}"
        yield Problem(f"{loop[0]}: fallback.models", message, "models that do not fall back to this one")


def with_values(model: Model, values: Mapping[str, Any], names: Mapping[str, str]) -> Model:
    """
    Returns a copy of the model in which `values` replace values of its entry; their keys are dotted.

    Raises InvalidInput with every problem. `names` maps keys to the names that the caller uses for them in messages.
    """
    merged = model.model_dump()
    for key, value in values.items():
        table, _, inner = key.rpartition(".")
        (merged[table] if table else merged)[inner] = value
    try:
        return Model.model_validate(merged)
    except ValidationError as error:
        problems = [problem for item in error.errors() for problem in _problems(item, 0, _SourceLines(""))]
    keys = [problem.where.removeprefix(f"{_MODELS_KEY}[0].") for problem in problems]
    named = [replace(problem, where=names.get(key, key)) for key, problem in zip(keys, problems, strict=True)]
    raise InvalidInput(named, f"options of {model.name}")


def to_toml(models: Iterable[Model]) -> str:
    """Returns the TOML text from which `parse` returns these models; most default values are left out."""
    return "\n".join(_table(model) for model in models)


def _table(model: Model) -> str:
    given = model.model_dump(mode="json", exclude_defaults=True) | {"context": model.context, "slots": model.slots}
    tables = {key: given.pop(key, {}) for key in ("prompt", "engine", "remote")}
    source = given.pop("source")
    if not isinstance(model.source, ServerSource):
        given["source"] = _source(source)
    lines = [f"[[{_MODELS_KEY}]]", *(f"{key} = {_toml(value)}" for key, value in given.items() if value != {})]
    for name, values in tables.items():
        if values:
            lines += ["", f"[{_MODELS_KEY}.{name}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _source(given: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the keys that verify the file after those that name it; a list of one value becomes that value."""
    checks = {key: value[0] if len(value) == 1 else value for key, value in given.items() if key in {"size", "sha256"}}
    return {key: value for key, value in given.items() if key not in checks} | checks


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():  # a JSON string is a TOML string, except for DEL, which JSON does not escape
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            return "{ " + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + " }"
        case list() | tuple():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _duplicates(models: Sequence[tuple[int, Model]], lines: _SourceLines) -> Iterator[Problem]:
    names: dict[str, int] = {}
    slugs: dict[str, tuple[int, str]] = {}
    for index, model in models:
        where, line = f"{_MODELS_KEY}[{index}].name", lines.find(index, "name")
        if (first := names.setdefault(model.name, index)) != index:
            message = f"{model.name!r} is already the name of {_MODELS_KEY}[{first}]"
            yield Problem(where, message, "each name once", line)
            continue
        owner_index, owner = slugs.setdefault(model.slug, (index, model.name))
        if owner_index != index:
            other = f"{owner!r} ({_MODELS_KEY}[{owner_index}])"
            message = f"{model.name!r} has the slug {model.slug!r}, and so has {other}"
            yield Problem(where, message, "a name with a unique slug", line)


def _follows_from_another(item: ErrorDetails, items: Sequence[ErrorDetails]) -> bool:
    """Returns whether a list is reported as too short only because its items were rejected one by one."""
    loc = item["loc"]
    return item["type"] == "too_short" and any(len(o["loc"]) > len(loc) and o["loc"][: len(loc)] == loc for o in items)


def _syntax_problem(message: str, text: str) -> Problem:
    place = _TOML_POSITION.search(message)
    line = text.count("\n") + 1 if place and place[1] is None else int(place[1]) if place else None
    reason = _TOML_POSITION.sub("", message).strip()
    return Problem("", f"this is not valid TOML: {reason[:1].lower()}{reason[1:]}", line=line)


def _problems(item: ErrorDetails, index: int, lines: _SourceLines) -> Iterator[Problem]:
    error = item.get("ctx", {}).get("error")
    if not isinstance(error, ConflictingOptions):
        yield _problem(item, index, lines)
        return
    for where, message, accepted in error.found:
        yield Problem(f"{_MODELS_KEY}[{index}].{where}", message, accepted, lines.find(index, *where.split(".")))


def _problem(item: ErrorDetails, index: int, lines: _SourceLines) -> Problem:
    path = [part for part in item["loc"] if not is_source_tag(part)]
    where = f"{_MODELS_KEY}[{index}]" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    written = path[:-1] if item["type"] == "missing" else path
    line = lines.find(index, *(part for part in written if isinstance(part, str)))
    owner = _class_of(item["loc"])
    key = str(path[-1]) if path else ""
    known = tuple(owner.model_fields)

    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, n=1)
        accepted = f"did you mean {close[0]}?" if close else ", ".join(known)
        return Problem(where, "there is no such key", accepted, line)
    named = next((part for part in reversed(path) if isinstance(part, str)), "")
    accepted = (owner.model_fields[named].description or "") if named in known else ""
    if item["type"] == "missing":
        return Problem(where, "is missing", accepted, line)
    if item["type"] == "value_error":
        # The message of a source already says what is accepted.
        of_source = item["loc"] and is_source_tag(item["loc"][-1])
        return Problem(where, item["msg"].removeprefix("Value error, "), "" if of_source else accepted, line)
    if item["type"] == "source":
        return Problem(where, item["msg"], line=line)
    message = "is not accepted" if accepted else item["msg"][:1].lower() + item["msg"][1:]
    return Problem(where, f"{item['input']!r} {message}", accepted, line)


def _class_of(loc: Sequence[int | str]) -> type[BaseModel]:
    """Returns the class whose field the error names: it has the descriptions and the known keys."""
    owner: type[BaseModel] = Model
    inner: Mapping[str, type[BaseModel]] = {
        "kv": KvTypes, "prompt": PromptProfile, "chunks": PackageFile, "engine": EngineEntry, "rope": Rope,
        "loras": SourcedAdapter, "draft": SourcedDraft, "pools": PoolOptions, "reserve": ReserveOptions,
        "simulated": SimulatedOptions,
        "sampling": RecommendedSampling, "mmproj": ProjectorEntry, "remote": RemoteEntry, "rating": Rating,
        "fallback": FallbackOptions,
    }  # fmt: skip
    for part in loc[:-1]:
        owner = SOURCES.get(str(part)) or inner.get(str(part)) or owner
    return owner


class _SourceLines:
    """The lines of a catalogue text: finds the line of an entry or of a key in it."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self._starts = [number for number, line in enumerate(self._lines) if _HEADER.match(line)]

    def find(self, index: int, *keys: str) -> int | None:
        """
        Returns the line, counted from 1, of the innermost key that occurs exactly once, else the first of the entry.

        Returns None when the text has no such `[[models]]` header, as with inline tables.
        """
        if index >= len(self._starts):
            return None
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self._starts) else len(self._lines)
        for key in map(re.escape, keys):
            assignment = re.compile(rf"^\s*(?:{key}[\s.=]|\[+\s*models\s*\.\s*(?:\w+\s*\.\s*)?{key}\s*\])")
            found = [number for number in range(start, end) if assignment.match(self._lines[number])]
            if len(found) == 1:
                start = found[0]
        return start + 1
