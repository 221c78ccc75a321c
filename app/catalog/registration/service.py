"""
The registration of a model: from what a user typed to an entry in the catalogue of the data directory.

The file is installed and verified before its entry is written; an interrupted registration is repeated from where it
stopped. The same file gets one entry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.catalog import catalog, files, header
from app.catalog.catalog import Catalog
from app.catalog.install import OnProgress
from app.catalog.metadata import Header
from app.catalog.model import Model, ProjectorEntry, slug
from app.catalog.registration import hub, own_catalog, removal, suggestion
from app.catalog.registration.reference import HubReference, PathReference, Reference, UrlReference
from app.catalog.source import FileSource, HubSource, ModelSource, UrlSource
from app.kernel.errors import Conflict, InvalidInput, ModelFileDamaged, Problem
from app.kernel.settings import Settings

#: The name of a model before its file is here.
_PROVISIONAL = "new:file"
#: The options of `arriero models pull` for values of the entry, by key, for messages.
_OPTIONS = {"context": "--context", "slots": "--slots"}


@dataclass(frozen=True, slots=True)
class Registered:
    """A model that was registered."""

    model: Model
    path: Path
    #: False when an entry with the same file was there before.
    added: bool


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a user wants of the entry."""

    name: str | None = None
    #: Replace an entry of that name.
    replace: bool = False
    #: Values by key of an entry, such as `context`.
    values: Mapping[str, Any] = field(default_factory=dict)


def register(
    reference: Reference,
    typed: str,
    settings: Settings,
    report: OnProgress,
    wishes: Wishes = Wishes(),
    *,
    again: bool = False,
) -> Registered:
    """
    Installs the file that a reference means, and adds an entry for it. `typed` is the reference as the user typed it.

    Raises Conflict when the name is taken, InvalidInput for a name or value that is not accepted, and what `files.pull`
    raises.
    """
    known, name, data_dir = files.catalog_of(settings), wishes.name, settings.data_dir
    with _translated(name or ""):
        provisional = Model(name=name or _PROVISIONAL, use_cases=("chat",), source=FileSource(path="/file.gguf"))
    catalog.with_values(provisional, wishes.values, _OPTIONS)
    source, projector = _source(reference, settings)
    mmproj = None if projector is None else ProjectorEntry(source=projector)
    provisional = provisional.model_copy(update={"source": source, "mmproj": mmproj})
    existing = next((model for model in known if name in (None, model.name) and _same_file(model.source, source)), None)
    is_new = existing is None or wishes.replace or bool(wishes.values)
    if name is not None and is_new:
        _check_name(name, known, replace=wishes.replace)
    path = files.pull(
        provisional, data_dir, report, token=settings.catalog.hub_token, hub=settings.catalog.hub, again=again
    )
    if existing is not None and not is_new:
        return Registered(existing, path, added=False)
    read = header.read(path)
    if reason := suggestion.unservable(read):
        removal.remove_files(provisional, known, data_dir)
        raise ModelFileDamaged(path, reason)
    with own_catalog.locked(data_dir):
        known = files.catalog_of(settings)
        if name is not None:
            _check_name(name, known, replace=wishes.replace)
        slugs = {slug(other) for other in known.names}
        entry = suggestion.suggest(read, source, name or suggestion.unique_name(read, slugs), mmproj)
        entry = catalog.with_values(entry, wishes.values, _OPTIONS)
        replaced = own_catalog.read(data_dir).find(entry.name)
        others = slugs - ({slug(entry.name)} if wishes.replace else set())
        own_catalog.put(entry, data_dir, others, _comment(typed, read), replace=wishes.replace)
    if replaced is not None:
        removal.remove_files(replaced.model_copy(update={"name": _PROVISIONAL}), files.catalog_of(settings), data_dir)
    return Registered(entry, path, added=True)


def _source(reference: Reference, settings: Settings) -> tuple[ModelSource, ModelSource | None]:
    """Returns the source of the model, and that of its projector where the hub has one."""
    match reference:
        case HubReference():
            with _translated(reference.repository):
                return hub.resolve(reference, settings.catalog.hub, settings.catalog.hub_token)
        case UrlReference(url=url):
            with _translated(url):
                return UrlSource(url=url), None
        case PathReference(path=path):
            with _translated(str(path)):
                return FileSource(path=str(path)), None


@contextlib.contextmanager
def _translated(typed: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        found = [
            Problem(typed, "is not accepted", Model.model_fields["name"].description or "")
            if item["loc"] == ("name",)
            else Problem(typed, item["msg"].removeprefix("Value error, "))
            for item in error.errors()
        ]
        raise InvalidInput(found, "reference of a model") from None


def _check_name(name: str, known: Catalog, *, replace: bool) -> None:
    problem = next((one for one in known if one.slug == slug(name)), None)
    if problem is None or (replace and problem.name == name):
        return
    origin = known.origins.get(problem.name, "")
    taken = name if problem.name == name else f"{problem.name}, which is too similar to {name},"
    raise Conflict(f"{taken} is already in the catalogue ({origin}); choose another name with --name, or --replace it")


def _same_file(one: ModelSource, other: ModelSource) -> bool:
    match one, other:
        case HubSource(), HubSource():
            return (one.hf, one.file, one.revision) == (other.hf, other.file, other.revision)
        case UrlSource(), UrlSource():
            return one.url == other.url
        case FileSource(), FileSource():
            return Path(one.path).expanduser() == Path(other.path)
    return False


def _comment(typed: str, read: Header) -> str:
    shown = typed.partition("?")[0]
    return f"{shown} ({read.quantisation}, trained for {read.context_length or 'an unknown number of'} tokens)"
