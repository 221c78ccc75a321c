"""
The registry of named workflows: all stored versions, and the shipped workflows.

A name belongs to a namespace. A version never changes. Storing a definition that equals the newest version returns that
version. A shipped workflow can run in every namespace without being stored; a stored version with the same name takes
precedence over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import text

from app.access import namespaces
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import InvalidDefinition, NotFound, Problem
from app.workflows.language import check
from app.workflows.language import definition as definitions
from app.workflows.language.definition import Definition
from app.workflows.runs.storage import store
from app.workflows.runs.storage.payloads import as_json

#: The folder of the shipped workflows; those of a library have a folder in it.
LIBRARY = Path(__file__).parent / "library"
#: The version number of a shipped workflow that is not stored.
SHIPPED = 0

_NEWEST = text("""
    SELECT version, sha256 FROM workflow WHERE namespace = :namespace AND name = :name ORDER BY version DESC LIMIT 1
""")
_LOCK_NAME = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 7205759403))")
_ADD = text("""
    INSERT INTO workflow (namespace, name, version, sha256) VALUES (:namespace, :name, :version, :sha256)
""")
_ONE = text("""
    SELECT namespace, workflow.name, workflow.version, workflow.created_at, definition.document
    FROM workflow JOIN definition USING (sha256)
    WHERE namespace = :namespace AND name = :name AND (CAST(:version AS integer) IS NULL OR version = :version)
    ORDER BY version DESC LIMIT 1
""")
_ALL = text("""
    SELECT DISTINCT ON (namespace, name) namespace, name, version, workflow.created_at, definition.document
    FROM workflow JOIN definition USING (sha256)
    WHERE CAST(:namespace AS text) IS NULL OR namespace = :namespace ORDER BY namespace, name, version DESC
""")
_VERSIONS = text("""
    SELECT version, created_at FROM workflow WHERE namespace = :namespace AND name = :name ORDER BY version DESC
""")


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a named workflow."""

    #: None for a shipped workflow that is not stored.
    namespace: str | None
    name: str
    #: 0 for a shipped workflow that is not stored.
    version: int
    #: None for version 0.
    created_at: datetime | None
    definition: Definition


def put(
    database: Database, name: str, definition: Definition, *, namespace: str = namespaces.DEFAULT
) -> tuple[Version, bool]:
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
        work.run(_LOCK_NAME, {"name": f"{namespace}/{name}"})
        newest = work.row(_NEWEST, {"namespace": namespace, "name": name})
        created = newest is None or newest.sha256 != sha256
        if created:
            store.keep_definition(work, sha256, as_json(definition.document()))
            version = (newest.version if newest else 0) + 1
            work.run(_ADD, {"namespace": namespace, "name": name, "version": version, "sha256": sha256})
        found = _stored(work, namespace, name, None)
    assert found is not None
    return found, created


def get(database: Database, name: str, version: int | None = None, *, namespace: str = namespaces.DEFAULT) -> Version:
    """Return a version in a namespace, by default the newest. Raises NotFound with the existing versions or names."""
    with database.work() as work:
        found = _stored(work, namespace, name, version) if version != SHIPPED else None
        if found is not None:
            return found
        if version in (None, SHIPPED) and name in shipped():
            return shipped()[name]
        values = {"namespace": namespace, "name": name}
        numbers = [str(row.version) for row in work.rows(_VERSIONS, values)]
    if numbers:
        raise NotFound(f"version of workflow {name!r}:", str(version), numbers)
    raise NotFound("workflow", name, [entry.name for entry in newest_of_all(database, namespace)])


def predecessor(database: Database, version: Version, *, namespace: str = namespaces.DEFAULT) -> Version:
    """Return the previous version. Raises NotFound when the given version is the first one."""
    numbers = [
        number for number, _ in versions(database, version.name, namespace=namespace) if number < version.version
    ]
    if not numbers and (version.version == SHIPPED or version.name not in shipped()):
        raise NotFound(f"version of workflow {version.name!r} before", str(version.version))
    return get(database, version.name, max(numbers, default=SHIPPED), namespace=namespace)


def newest_of_all(database: Database, namespace: str | None) -> list[Version]:
    """Return the newest version of each workflow of a namespace, or of all, by name."""
    with database.work() as work:
        stored = [_version_of(row) for row in work.rows(_ALL, {"namespace": namespace})]
    replaced = {entry.name for entry in stored if namespace is not None}
    found = [*stored, *(entry for entry in shipped().values() if entry.name not in replaced)]
    return sorted(found, key=lambda entry: (entry.name, entry.namespace or ""))


def versions(database: Database, name: str, *, namespace: str = namespaces.DEFAULT) -> list[tuple[int, datetime]]:
    """Return the number and the time of each stored version, the newest first."""
    with database.work() as work:
        return [(row.version, row.created_at) for row in work.rows(_VERSIONS, {"namespace": namespace, "name": name})]


def shipped() -> dict[str, Version]:
    """Return the shipped workflows by name."""
    if not _SHIPPED:
        for path in sorted(LIBRARY.rglob("*.yaml")):
            definition = check.parse(path.read_text(encoding="utf-8"))
            _SHIPPED[definition.workflow] = Version(None, definition.workflow, SHIPPED, None, definition)
    return dict(_SHIPPED)


_SHIPPED: dict[str, Version] = {}


def _stored(work: UnitOfWork, namespace: str, name: str, version: int | None) -> Version | None:
    row = work.row(_ONE, {"namespace": namespace, "name": name, "version": version})
    return None if row is None else _version_of(row)


def _version_of(row: Any) -> Version:
    return Version(row.namespace, row.name, row.version, row.created_at, definitions.from_document(row.document))
