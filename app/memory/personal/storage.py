"""
The statements on documents of the personal context. Each runs in the transaction of its caller.

A document is found by namespace, user, kind and name. A document of a file changes only with its file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import text

from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.kernel.errors import Conflict, NotFound
from app.kernel.sections.context import ContextSettings
from app.memory.personal import indexing
from app.memory.personal.document import (
    PREFIX,
    ContextDocument,
    ContextFormat,
    ContextKind,
    ContextSource,
    NewContextDocument,
)

_COLUMNS = """
    id, namespace, user_name, kind, name, format, title, content, tags, always, source, version, created_at, updated_at
"""
_KEY = "namespace = :namespace AND user_name = :user AND kind = :kind AND name = :name"
_FIND = text(f"SELECT {_COLUMNS} FROM context_document WHERE {_KEY}")
_HOLD = text(f"SELECT {_COLUMNS} FROM context_document WHERE {_KEY} FOR UPDATE")
_COUNT = text("SELECT count(*) AS n FROM context_document WHERE namespace = :namespace AND user_name = :user")
_PUT = text("""
    INSERT INTO context_document AS d
        (id, namespace, user_name, kind, name, format, title, content, tags, always, source, version)
    VALUES (:id, :namespace, :user, :kind, :name, :format, :title, :content, CAST(:tags AS json), :always, :source, 1)
    ON CONFLICT (namespace, user_name, kind, name) DO UPDATE SET
        format = :format, title = :title, content = :content, tags = CAST(:tags AS json), always = :always,
        source = :source, version = d.version + 1, updated_at = now()
    RETURNING id
""")
_OF_IDS = text(f"""
    SELECT {_COLUMNS} FROM context_document
    WHERE id = ANY(CAST(:ids AS uuid[])) AND namespace = :namespace AND user_name = ANY(:users)
""")
_DELETE = text("DELETE FROM context_document WHERE id = CAST(:id AS uuid)")
_DELETE_OF_USER = text("""
    DELETE FROM context_document WHERE namespace = :namespace AND user_name = :user RETURNING id
""")
_FORGET_FILES_OF_USER = text("DELETE FROM context_file WHERE namespace = :namespace AND user_name = :user")
_ALWAYS = text(f"""
    SELECT {_COLUMNS} FROM context_document
    WHERE namespace = :namespace AND user_name = ANY(:users) AND always
    ORDER BY user_name, kind, name LIMIT :limit
""")


class DocumentOfFolder(Conflict):
    """The document comes from a file of the watched folder, and changes only with it."""

    def __init__(self, document: ContextDocument) -> None:
        super().__init__(
            f"the document {document.kind}/{document.name} comes from the watched folder (setting context.folder); "
            "change or remove its file"
        )


class DocumentChanged(Conflict):
    """The document has another version than the one that the change is based on."""

    def __init__(self, name: str, expected: int, current: int) -> None:
        self.expected, self.current = expected, current
        state = f"is at version {current}" if current else "does not exist"
        super().__init__(
            f"the document {name!r} {state}, and the change is based on version {expected}; "
            "read it again and repeat the change"
        )


class TooManyDocuments(Conflict):
    """A user has as many documents as one may have."""


@dataclass(frozen=True, slots=True)
class ContextOwner:
    """Whose documents."""

    namespace: str
    #: None: those of the whole namespace.
    user: str | None = None


def put_in(
    work: UnitOfWork,
    owner: ContextOwner,
    new: NewContextDocument,
    settings: ContextSettings,
    *,
    source: ContextSource = ContextSource.API,
    expected: int | None = None,
) -> tuple[ContextDocument, bool]:
    """
    Store a document; returns it, and whether its name was new. The same content makes no new version.

    With `expected`, the stored one must have this version; 0: there must be none. Raises DocumentChanged,
    DocumentOfFolder, TooManyDocuments.
    """
    found = find_in(work, owner, new.kind, new.name, hold=True)
    if found is not None and source is ContextSource.API:
        require_api(found)
    current = 0 if found is None else found.version
    if expected is not None and expected != current:
        raise DocumentChanged(new.name, expected, current)
    if found is not None and _is_same(found, new) and found.source is source:
        return found, False
    if found is None:
        count = work.row(_COUNT, _owner(owner))
        assert count is not None, "an aggregate has one row"
        if count.n >= settings.max_documents:
            raise TooManyDocuments(
                f"there are {count.n} documents, and no more are accepted (setting context.max_documents)"
            )
    given = {
        "id": ids.new_id(),
        "kind": new.kind,
        "name": new.name,
        "format": new.format,
        "title": new.title,
        "content": new.content,
        "tags": json.dumps(new.tags),
        "always": new.always,
        "source": source,
    }
    work.execute(_PUT, {**_owner(owner), **given})
    stored = get_in(work, owner, new.kind, new.name)
    indexing.index_in(work, stored)
    return stored, found is None


def require_api(document: ContextDocument) -> None:
    """Raise DocumentOfFolder for a document that changes only with its file."""
    if document.source is ContextSource.FOLDER:
        raise DocumentOfFolder(document)


def _is_same(found: ContextDocument, new: NewContextDocument) -> bool:
    return (found.format, found.content) == (new.format, new.content)


def find_in(
    work: UnitOfWork, owner: ContextOwner, kind: ContextKind, name: str, *, hold: bool = False
) -> ContextDocument | None:
    """Return a document, or None; with `hold`, nobody else changes it meanwhile."""
    row = work.row(_HOLD if hold else _FIND, {**_owner(owner), "kind": kind, "name": name})
    return None if row is None else _document(row)


def get_in(
    work: UnitOfWork, owner: ContextOwner, kind: ContextKind, name: str, *, hold: bool = False
) -> ContextDocument:
    """Return a document. Raises NotFound."""
    found = find_in(work, owner, kind, name, hold=hold)
    if found is None:
        raise NotFound("document", f"{kind}/{name}")
    return found


def list_in(
    work: UnitOfWork,
    namespace: str | None,
    *,
    user: str | None = None,
    of_namespace: bool = False,
    kind: ContextKind | None = None,
    after: str | None = None,
    limit: int = 100,
) -> list[ContextDocument]:
    """
    Return documents in the order in which they were created, without their contents.

    `user` names a user; `of_namespace` chooses those that belong to no user; without both, those of all.
    """
    conditions, given = ["TRUE"], {"limit": limit, "namespace": namespace, "user": user, "kind": kind, "after": after}
    if namespace is not None:
        conditions.append("namespace = :namespace")
    if user is not None:
        conditions.append("user_name = :user")
    if of_namespace:
        conditions.append("user_name = ''")
    if kind is not None:
        conditions.append("kind = :kind")
    if after is not None:
        conditions.append("id > CAST(:after AS uuid)")
        given["after"] = _digits(after)
    columns = _COLUMNS.replace("content,", "'' AS content,")
    statement = text(
        f"SELECT {columns} FROM context_document WHERE {' AND '.join(conditions)} ORDER BY id LIMIT :limit"
    )
    return [_document(row) for row in work.rows(statement, given)]


def always_in(work: UnitOfWork, owner: ContextOwner, limit: int) -> list[ContextDocument]:
    """Return the documents that each prompt for a user contains: those of the namespace and the user's own."""
    users = ["", *([] if owner.user is None else [owner.user])]
    rows = work.rows(_ALWAYS, {"namespace": owner.namespace, "users": users, "limit": limit})
    return [_document(row) for row in rows]


def of_ids_in(work: UnitOfWork, owner: ContextOwner, document_ids: Sequence[str]) -> list[ContextDocument]:
    """Return the documents with these ids that belong to the user or to the whole namespace."""
    given = {"namespace": owner.namespace, "users": ["", owner.user or ""], "ids": [*map(_digits, document_ids)]}
    return [_document(row) for row in work.rows(_OF_IDS, given)] if document_ids else []


def delete_in(work: UnitOfWork, document: ContextDocument) -> None:
    """Delete a document."""
    delete_by_id_in(work, document.namespace, document.id)


def delete_by_id_in(work: UnitOfWork, namespace: str, document_id: str) -> None:
    """Delete a document by its id; one that is not there stays so."""
    work.execute(_DELETE, {"id": _digits(document_id)})
    indexing.forget_in(work, namespace, [document_id])


def delete_of_user_in(work: UnitOfWork, namespace: str, user: str) -> list[str]:
    """
    Delete all documents of a user, and what is known of the user's files. Returns the ids of the documents.

    Files that are still in the watched folder are imported again.
    """
    deleted = [_shown_id(row.id) for row in work.rows(_DELETE_OF_USER, {"namespace": namespace, "user": user})]
    work.execute(_FORGET_FILES_OF_USER, {"namespace": namespace, "user": user})
    indexing.forget_in(work, namespace, deleted)
    return deleted


def _owner(owner: ContextOwner) -> dict[str, Any]:
    return {"namespace": owner.namespace, "user": owner.user or ""}


def _shown_id(id_: Any) -> str:
    return f"{PREFIX}{id_.hex}"


def _digits(id_: str) -> str:
    """Return the id as Postgres reads it; of a text that is no id, the id of nothing."""
    digits = id_.removeprefix(PREFIX)
    is_id = id_.startswith(PREFIX) and len(digits) == 32 and set(digits) <= set("0123456789abcdef")
    return digits if is_id else "0" * 32


def _document(row: Any) -> ContextDocument:
    return ContextDocument(
        kind=ContextKind(row.kind),
        name=row.name,
        format=ContextFormat(row.format),
        title=row.title,
        content=row.content,
        tags=tuple(row.tags),
        always=row.always,
        id=_shown_id(row.id),
        namespace=row.namespace,
        user=row.user_name or None,
        source=ContextSource(row.source),
        version=row.version,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
