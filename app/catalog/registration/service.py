"""
The registration of a model: from what a user typed to an entry in the catalogue of the data directory.

The file is installed and verified before its entry is written; an interrupted registration is repeated from where it
stopped. The same file gets one entry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.catalog import catalog, files, header
from app.catalog.catalog import Catalog
from app.catalog.install import OnProgress
from app.catalog.metadata import Header
from app.catalog.model import Model, slug
from app.catalog.registration import hub, own_catalog, suggestion
from app.catalog.registration.reference import HubReference, PathReference, Reference, UrlReference
from app.catalog.source import FileSource, HubSource, ModelSource, UrlSource
from app.kernel.errors import Conflict, InvalidInput, ModelFileDamaged, Problem
from app.kernel.settings import Settings

#: The name of a model before its file is here.
_PROVISIONAL = "new:file"


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
    values: Mapping[str, Any] | None = None


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
    known = files.catalog_of(settings)
    name = wishes.name
    if name is not None:
        with _translated(name):
            Model(name=name, use_cases=("chat",), source=FileSource(path="/file.gguf"))
        _check_name(name, known, replace=wishes.replace)
    source = _source(reference, settings)
    existing = next((model for model in known if _same_file(model.source, source)), None)
    path = files.pull(
        Model(name=name or _PROVISIONAL, use_cases=("chat",), source=source),
        settings.data_dir,
        report,
        token=settings.catalog.hub_token,
        hub=settings.catalog.hub,
        again=again,
    )
    if existing is not None and name in (None, existing.name) and not wishes.replace and not wishes.values:
        return Registered(existing, path, added=False)
    read = header.read(path)
    if reason := suggestion.unservable(read):
        raise ModelFileDamaged(path, reason)
    with own_catalog.locked(settings.data_dir):
        known = files.catalog_of(settings)
        if name is not None:
            _check_name(name, known, replace=wishes.replace)
        slugs = {slug(other) for other in known.names}
        entry = suggestion.suggest(read, source, name or suggestion.unique_name(read, slugs))
        if wishes.values:
            entry = catalog.with_values(entry, wishes.values, {})
        replaced = {slug(entry.name)} if wishes.replace else set[str]()
        own_catalog.put(entry, settings.data_dir, slugs - replaced, _comment(typed, read), replace=wishes.replace)
    return Registered(entry, path, added=True)


def _source(reference: Reference, settings: Settings) -> ModelSource:
    match reference:
        case HubReference():
            with _translated(reference.repository):
                return hub.resolve(reference, settings.catalog.hub, settings.catalog.hub_token)
        case UrlReference(url=url):
            with _translated(url):
                return UrlSource(url=url)
        case PathReference(path=path):
            with _translated(str(path)):
                return FileSource(path=str(path))


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
