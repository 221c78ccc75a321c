"""
The named workflows: every version of each, and those that are shipped.

A version never changes. Storing what is already the newest version gives that version again.
A shipped workflow can be run without being stored; storing one of its name puts a version before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text

from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import InvalidDefinition, NotFound, Problem
from app.workflows.language import check
from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition
from app.workflows.runs.storage import store
from app.workflows.runs.storage.payloads import as_json

#: Where the shipped workflows lie.
LIBRARY = Path(__file__).parent / "library"
#: The version of a shipped workflow that nobody has stored.
SHIPPED = 0

_NEWEST = text("SELECT version, sha256 FROM workflow WHERE name = :name ORDER BY version DESC LIMIT 1")
_LOCK_NAME = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 7205759403))")
_ADD = text("INSERT INTO workflow (name, version, sha256) VALUES (:name, :version, :sha256)")
_ONE = text("""
    SELECT workflow.name, workflow.version, workflow.created_at, definition.document
    FROM workflow JOIN definition USING (sha256)
    WHERE name = :name AND (CAST(:version AS integer) IS NULL OR version = :version) ORDER BY version DESC LIMIT 1
""")
_ALL = text("""
    SELECT DISTINCT ON (name) name, version, workflow.created_at, definition.document
    FROM workflow JOIN definition USING (sha256) ORDER BY name, version DESC
""")
_VERSIONS = text("SELECT version, created_at FROM workflow WHERE name = :name ORDER BY version DESC")


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a named workflow."""

    name: str
    #: 0 for a shipped one that was never stored.
    version: int
    #: None for a shipped one.
    created_at: datetime | None
    definition: Definition


def put(database: Database, name: str, definition: Definition) -> tuple[Version, bool]:
    """
    Store a definition as the newest version of its name; False when it is that already.

    Raises InvalidDefinition when the definition bears another name.
    """
    if definition.workflow != name:
        message = f"the definition is of {definition.workflow!r}, the address names {name!r}"
        raise InvalidDefinition([Problem("workflow", message, repr(name))])
    sha256 = definition.sha256()
    with database.work() as work:
        work.run(_LOCK_NAME, {"name": name})
        newest = work.row(_NEWEST, {"name": name})
        created = newest is None or newest.sha256 != sha256
        if created:
            store.keep_definition(work, sha256, as_json(definition.document()))
            version = (newest.version if newest else 0) + 1
            work.run(_ADD, {"name": name, "version": version, "sha256": sha256})
        found = _stored(work, name, None)
    assert found is not None
    return found, created


def get(database: Database, name: str, version: int | None = None) -> Version:
    """The version of that number, or the newest. Raises NotFound, naming those that there are."""
    with database.work() as work:
        found = _stored(work, name, version) if version != SHIPPED else None
        if found is not None:
            return found
        if version in (None, SHIPPED) and name in shipped():
            return shipped()[name]
        numbers = [str(row.version) for row in work.rows(_VERSIONS, {"name": name})]
    if numbers:
        raise NotFound(f"version of workflow {name!r}:", str(version), numbers)
    raise NotFound("workflow", name, [entry.name for entry in newest_of_all(database)])


def before(database: Database, version: Version) -> Version:
    """The version that this one followed. Raises NotFound when it is the first."""
    numbers = [number for number, _ in versions(database, version.name) if number < version.version]
    if not numbers and (version.version == SHIPPED or version.name not in shipped()):
        raise NotFound(f"version of workflow {version.name!r} before", str(version.version))
    return get(database, version.name, max(numbers, default=SHIPPED))


def newest_of_all(database: Database) -> list[Version]:
    """The newest version of every workflow, by name."""
    with database.work() as work:
        found = {row.name: _of(row) for row in work.rows(_ALL)}
    return sorted((shipped() | found).values(), key=lambda entry: entry.name)


def versions(database: Database, name: str) -> list[tuple[int, datetime]]:
    """Number and time of every stored version, the newest first."""
    with database.work() as work:
        return [(row.version, row.created_at) for row in work.rows(_VERSIONS, {"name": name})]


def shipped() -> dict[str, Version]:
    """The workflows that come with Arriero, by name."""
    if not _SHIPPED:
        for path in sorted(LIBRARY.glob("*.yaml")):
            definition = check.parse(path.read_text(encoding="utf-8"))
            _SHIPPED[definition.workflow] = Version(definition.workflow, SHIPPED, None, definition)
    return dict(_SHIPPED)


_SHIPPED: dict[str, Version] = {}


def _stored(work: UnitOfWork, name: str, version: int | None) -> Version | None:
    row = work.row(_ONE, {"name": name, "version": version})
    return None if row is None else _of(row)


def _of(row: Any) -> Version:
    return Version(row.name, row.version, row.created_at, definitions.stored(row.document))
