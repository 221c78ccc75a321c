"""
The registry of named workflows: all stored versions, and the shipped workflows.

A version never changes. Storing a definition that equals the newest version returns that version.
A shipped workflow can run without being stored. A stored version with the same name takes precedence over it.
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

#: The folder of the shipped workflows.
LIBRARY = Path(__file__).parent / "library"
#: The version number of a shipped workflow that is not stored.
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
    #: 0 for a shipped workflow that is not stored.
    version: int
    #: None for version 0.
    created_at: datetime | None
    definition: Definition


def put(database: Database, name: str, definition: Definition) -> tuple[Version, bool]:
    """
    Store a definition as the newest version of its name.

    The second value is False when the newest version already equals the definition.
    Raises InvalidDefinition when the definition has another name.
    """
    if definition.workflow != name:
        message = f"the name {definition.workflow!r} in the definition differs from the name {name!r} in the URL"
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
    """Return a version, by default the newest. Raises NotFound with the existing versions or names."""
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


def predecessor(database: Database, version: Version) -> Version:
    """Return the previous version. Raises NotFound when the given version is the first one."""
    numbers = [number for number, _ in versions(database, version.name) if number < version.version]
    if not numbers and (version.version == SHIPPED or version.name not in shipped()):
        raise NotFound(f"version of workflow {version.name!r} before", str(version.version))
    return get(database, version.name, max(numbers, default=SHIPPED))


def newest_of_all(database: Database) -> list[Version]:
    """Return the newest version of each workflow, by name."""
    with database.work() as work:
        found = {row.name: _version_of(row) for row in work.rows(_ALL)}
    return sorted((shipped() | found).values(), key=lambda entry: entry.name)


def versions(database: Database, name: str) -> list[tuple[int, datetime]]:
    """Return the number and the time of each stored version, the newest first."""
    with database.work() as work:
        return [(row.version, row.created_at) for row in work.rows(_VERSIONS, {"name": name})]


def shipped() -> dict[str, Version]:
    """Return the shipped workflows by name."""
    if not _SHIPPED:
        for path in sorted(LIBRARY.glob("*.yaml")):
            definition = check.parse(path.read_text(encoding="utf-8"))
            _SHIPPED[definition.workflow] = Version(definition.workflow, SHIPPED, None, definition)
    return dict(_SHIPPED)


_SHIPPED: dict[str, Version] = {}


def _stored(work: UnitOfWork, name: str, version: int | None) -> Version | None:
    row = work.row(_ONE, {"name": name, "version": version})
    return None if row is None else _version_of(row)


def _version_of(row: Any) -> Version:
    return Version(row.name, row.version, row.created_at, definitions.from_document(row.document))
