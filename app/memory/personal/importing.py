"""
The import of the watched folder: its files become documents, and stay equal to them.

A file is read again when its size or its time has changed, and stored when its content has. A file that is no document
is recorded with its problem, stops no other, and leaves the document that it was before. A document is removed with its
file, unless the folder itself is not there: then nothing changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import text

from app.kernel import log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import ArrieroError, Conflict, InvalidInput, Unavailable, shortened
from app.kernel.sections.context import ContextSettings
from app.memory.personal import folder as folders
from app.memory.personal import storage
from app.memory.personal.document import ContextSource, parsed
from app.memory.personal.folder import FilePlace, FolderFile, FolderUnreadable

_log = log.get(__name__)

#: Most characters of a problem that are stored.
_MAX_PROBLEM = 1_000

_COLUMNS = "path, namespace, user_name, size, mtime_ns, sha256, problem, document_id, read_at"
_KNOWN = text(f"SELECT {_COLUMNS} FROM context_file")
_FILES = f"""
    SELECT {_COLUMNS} FROM context_file
    WHERE (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
      AND (CAST(:after AS text) IS NULL OR path > :after) {{more}} ORDER BY path LIMIT :limit
"""
_ALL_FILES, _PROBLEMS = text(_FILES.format(more="")), text(_FILES.format(more="AND problem <> ''"))
_OTHER = text("SELECT path FROM context_file WHERE document_id = CAST(:id AS uuid) AND path <> :path")
_NOTE = text("""
    INSERT INTO context_file (path, namespace, user_name, size, mtime_ns, sha256, problem, document_id)
    VALUES (:path, :namespace, :user, :size, :mtime_ns, :sha256, :problem, CAST(:document AS uuid))
    ON CONFLICT (path) DO UPDATE SET
        size = :size, mtime_ns = :mtime_ns, sha256 = :sha256, problem = :problem, read_at = now(),
        document_id = COALESCE(CAST(:document AS uuid), context_file.document_id)
""")
_FORGET = text("DELETE FROM context_file WHERE path = :path")


@dataclass(frozen=True, slots=True)
class ImportedFile:
    """A file of the folder, as it was read last."""

    path: str
    namespace: str
    user: str | None
    size: int
    mtime_ns: int
    sha256: str
    problem: str
    document_id: str | None
    read_at: datetime


@dataclass(frozen=True, slots=True)
class FolderImport:
    """What one pass has done."""

    stored: int = 0
    removed: int = 0
    #: Files with problems that are new.
    refused: int = 0


def import_folder(database: Database, settings: ContextSettings, in_time: Callable[[], bool]) -> FolderImport:
    """
    Make documents equal to the files of the folder, while `in_time()` is true.

    Raises Unavailable, and FolderUnreadable when the folder is not there.
    """
    assert settings.folder is not None, "a folder is watched"
    # What is known is read first: a file that comes after it is not taken for one that was removed.
    with database.work() as work:
        known = {row.path: _file(row) for row in work.rows(_KNOWN)}
    listed = folders.listing(settings.folder, settings.max_files)
    if listed.is_cut:
        _log.warning("context_folder_has_too_many_files", limit=settings.max_files)
    stored = removed = refused = 0
    for file in listed.files:
        if not in_time():
            break
        problem = _import(database, settings, file, known.get(file.path))
        if problem is None:
            continue
        before = known.get(file.path)
        if problem and (before is None or before.problem != problem):
            refused += 1
            _log.warning("context_file_refused", path=file.path, problem=problem)
        stored += not problem
    there = {file.path for file in listed.files}
    for path in sorted(known.keys() - there):
        if not in_time():
            break
        if not folders.exists(settings.folder, path):
            _remove(database, known[path])
            removed += 1
    return FolderImport(stored, removed, refused)


def files_in(
    work: UnitOfWork, namespace: str | None, *, only_problems: bool = False, after: str | None = None, limit: int = 100
) -> list[ImportedFile]:
    """Return the files of a namespace, or of all, by path."""
    statement = _PROBLEMS if only_problems else _ALL_FILES
    return [_file(row) for row in work.rows(statement, {"namespace": namespace, "after": after, "limit": limit})]


def _import(database: Database, settings: ContextSettings, file: FolderFile, known: ImportedFile | None) -> str | None:
    """Import one file. Returns its problem, empty when it was stored; None when there was nothing to do."""
    unchanged = known is not None and (known.size, known.mtime_ns) == (file.size, file.mtime_ns)
    if unchanged and known is not None and not known.problem:
        return None
    sha256 = ""
    try:
        if file.problem:
            raise FolderUnreadable(file.problem)
        place = folders.place_of(file.path)
        content = folders.read(_folder(settings), file.path, settings.max_document_bytes)
        sha256 = hashlib.sha256(content).hexdigest()
        if known is not None and known.sha256 == sha256 and not known.problem:
            _note(database, file, sha256)
            return None
        _store(database, settings, file, place, content, sha256)
    except Unavailable:
        raise
    except (ArrieroError, UnicodeDecodeError) as error:
        problem = _shown(error)
        if known is None or not unchanged or known.problem != problem:
            _note(database, file, sha256, problem)
        return problem
    except psycopg.Error as error:
        # One file that the database refuses stops no other.
        _log.exception("context_file_not_stored", path=file.path)
        problem = f"it cannot be stored: {type(error).__name__}"
        _note(database, file, sha256, problem)
        return problem
    return ""


def _store(
    database: Database, settings: ContextSettings, file: FolderFile, place: FilePlace, content: bytes, sha256: str
) -> None:
    new = parsed(place.kind, place.name, place.format, content.decode("utf-8"), settings.max_document_bytes)
    with database.work() as work:
        existing = storage.find_in(work, place.owner, place.kind, place.name, hold=True)
        if existing is not None and existing.source is ContextSource.API:
            raise Conflict(
                f"a document {place.kind}/{place.name} was stored over the API; delete that one, or rename the file"
            )
        other = None if existing is None else work.row(_OTHER, {"id": _digits(existing.id), "path": file.path})
        if other is not None:
            raise Conflict(f"{other.path} has the same name; rename one of the two")
        document, _ = storage.put_in(work, place.owner, new, settings, source=ContextSource.FOLDER)
        work.execute(_NOTE, {**_values(file), "sha256": sha256, "problem": "", "document": _digits(document.id)})


def _note(database: Database, file: FolderFile, sha256: str, problem: str = "") -> None:
    with database.work() as work:
        work.execute(_NOTE, {**_values(file), "sha256": sha256, "problem": problem, "document": None})


def _remove(database: Database, file: ImportedFile) -> None:
    with database.work() as work:
        if file.document_id is not None:
            storage.delete_by_id_in(work, file.namespace, file.document_id)
        work.execute(_FORGET, {"path": file.path})


def _values(file: FolderFile) -> Mapping[str, Any]:
    try:
        owner = folders.place_of(file.path).owner if file.path.count("/") == 3 else None
    except InvalidInput:
        owner = None
    return {
        "path": file.path,
        # Only callers of all namespaces see a file that belongs to none.
        "namespace": "" if owner is None else owner.namespace,
        "user": "" if owner is None else owner.user or "",
        "size": file.size,
        "mtime_ns": file.mtime_ns,
    }


def _shown(error: Exception) -> str:
    if isinstance(error, InvalidInput):
        return shortened("; ".join(str(problem) for problem in error.problems), _MAX_PROBLEM)
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    return shortened(str(error), _MAX_PROBLEM)


def _folder(settings: ContextSettings) -> Path:
    assert settings.folder is not None, "a folder is watched"
    return settings.folder


def _digits(document_id: str) -> str:
    return document_id.rpartition("_")[2]


def _file(row: Any) -> ImportedFile:
    document = None if row.document_id is None else f"doc_{row.document_id.hex}"
    return ImportedFile(
        row.path,
        row.namespace,
        row.user_name or None,
        row.size,
        row.mtime_ns,
        row.sha256,
        row.problem,
        document,
        row.read_at,
    )
