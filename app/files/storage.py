"""
The storage of files: in Postgres, in chunks, written and read as streams.

A file is visible once it is complete, and until it expires. Its namespace never holds more than its limits.
A removed file is invisible at once; its content is then deleted part by part, by the caller or by the scheduled job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import text

from app.files.file import StoredFile, shown_id
from app.files.rows import CHUNK_BYTES
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import ArrieroError, Conflict, NotFound
from app.kernel.sections.files import FileSettings

_log = log.get(__name__)

#: A file that is not complete after this time since its last part is removed.
_WRITTEN_WITHIN = timedelta(hours=1)
#: Chunks that one transaction writes or reads, and that one deletes.
_WRITTEN, _READ, _DELETED = 8, 4, 256

_COLUMNS = "id, namespace, filename, purpose, bytes, sha256, created_at, expires_at"
_VISIBLE = "sha256 IS NOT NULL AND (expires_at IS NULL OR expires_at > now())"
_USED = text("SELECT COALESCE(sum(bytes), 0) AS bytes, count(*) AS files FROM file WHERE namespace = :namespace")
_BEGIN = text("""
    INSERT INTO file (id, namespace, filename, purpose, bytes, expires_at)
    VALUES (:id, :namespace, '', '', 0, now() + CAST(:within AS interval))
""")
_APPEND = text("INSERT INTO file_chunk (file_id, number, data) VALUES (:id, :number, :data)")
_GROW = text("""
    UPDATE file SET bytes = bytes + :bytes, expires_at = now() + CAST(:within AS interval)
    WHERE id = :id AND sha256 IS NULL
""")
_FINISH = text(f"""
    UPDATE file SET filename = :filename, purpose = :purpose, sha256 = :sha256,
                    expires_at = now() + CAST(:keep AS interval)
    WHERE id = :id AND sha256 IS NULL RETURNING {_COLUMNS}
""")
_GET = text(f"SELECT {_COLUMNS} FROM file WHERE id = :id AND {_VISIBLE}")
_HOLD = text(f"SELECT {_COLUMNS} FROM file WHERE id = :id AND {_VISIBLE} FOR KEY SHARE")
_EQUAL = text(f"""
    SELECT {_COLUMNS} FROM file
    WHERE namespace = :namespace AND bytes = :bytes AND purpose = :purpose AND sha256 = :sha256
          AND (expires_at IS NULL OR expires_at > now() + CAST(:until AS interval))
    ORDER BY id DESC LIMIT 1
""")
_READ_CHUNKS = text("""
    SELECT data FROM file_chunk WHERE file_id = :id AND number >= :first AND number < :end ORDER BY number
""")
_SLICE = text("""
    SELECT substr(data, first + 1, GREATEST(last - first, 0)) AS data FROM (
        SELECT number, data, CAST(GREATEST(:offset - number * :chunk, 0) AS integer) AS first,
               CAST(LEAST(:end - number * :chunk, :chunk) AS integer) AS last
        FROM file_chunk
        WHERE file_id = :id AND number BETWEEN CAST(:offset AS bigint) / :chunk AND (CAST(:end AS bigint) - 1) / :chunk
    ) AS part ORDER BY number
""")
_LOCK = text("SELECT id FROM file WHERE id = :id FOR UPDATE")
_EXPIRE = text("UPDATE file SET expires_at = now() WHERE id = :id")
_DELETE_CHUNKS = text("""
    DELETE FROM file_chunk WHERE file_id = :id AND number IN (
        SELECT number FROM file_chunk WHERE file_id = :id ORDER BY number LIMIT :limit
    )
""")
_DELETE = text("DELETE FROM file WHERE id = :id AND expires_at <= now()")
_EXPIRED = text("""
    SELECT id FROM file WHERE expires_at <= now() AND id <> ALL(:passed) ORDER BY expires_at LIMIT 100
""")


class FileTooLarge(ArrieroError):
    """A file, or the files of a namespace together, would exceed a limit."""


@dataclass(frozen=True, slots=True)
class FilePage:
    """A part of the list of files."""

    files: list[StoredFile]
    has_more: bool


class FileWriter:
    """Writes one file. Nobody sees it before `finish`."""

    def __init__(self, database: Database, namespace: str, limits: FileSettings | None) -> None:
        """
        Begin a file. Without limits its size does not count: results of work that was done are not refused.

        Raises FileTooLarge when the namespace has no room for another one.
        """
        self.id = ids.new_id()
        self._database, self._namespace, self._limits = database, namespace, limits
        self._hash, self._buffer, self._number, self._bytes = hashlib.sha256(), bytearray(), 0, 0
        with database.work() as work:
            self._require_room(work, new=True)
            work.execute(_BEGIN, {"id": self.id, "namespace": namespace, "within": _WRITTEN_WITHIN})

    def write(self, data: bytes) -> None:
        """Append data. Raises FileTooLarge."""
        self._bytes += len(data)
        if self._limits is not None and self._bytes > self._limits.max_bytes:
            raise FileTooLarge(f"the file is larger than {self._limits.max_bytes} bytes (setting files.max_bytes)")
        self._hash.update(data)
        self._buffer += data
        if len(self._buffer) >= _WRITTEN * CHUNK_BYTES:
            with self._database.work() as work:
                self._store(work, whole=False)

    def finish(self, filename: str, purpose: str, keep: timedelta | None, work: UnitOfWork | None = None) -> StoredFile:
        """
        Complete the file, which expires after `keep`. With `work` this is part of another transaction.

        Raises FileTooLarge, and Conflict when the file was removed because it took too long.
        """
        if work is None:
            with self._database.work() as own:
                return self._finish(own, filename, purpose, keep)
        return self._finish(work, filename, purpose, keep)

    def _finish(self, work: UnitOfWork, filename: str, purpose: str, keep: timedelta | None) -> StoredFile:
        self._store(work, whole=True)
        values = {
            "id": self.id,
            "filename": filename,
            "purpose": purpose,
            "sha256": self._hash.hexdigest(),
            "keep": keep,
        }
        found = work.row_of(StoredFile, _FINISH, values)
        if found is None:
            raise Conflict("the file took too long to be written, and was removed")
        return found

    def discard(self) -> None:
        """Remove what was written."""
        remove(self._database, self.id)

    def _store(self, work: UnitOfWork, *, whole: bool) -> None:
        """Write the buffered chunks; with `whole` also the last one, which may be shorter."""
        length = len(self._buffer) if whole else len(self._buffer) - len(self._buffer) % CHUNK_BYTES
        if not length:
            return
        view = bytes(self._buffer[:length])
        parts = [view[at : at + CHUNK_BYTES] for at in range(0, length, CHUNK_BYTES)]
        work.execute(
            _APPEND,
            [{"id": self.id, "number": self._number + at, "data": data} for at, data in enumerate(parts)],
        )
        if not work.run(_GROW, {"id": self.id, "bytes": length, "within": _WRITTEN_WITHIN}):
            raise Conflict("the file took too long to be written, and was removed")
        self._require_room(work)
        del self._buffer[:length]
        self._number += len(parts)

    def _require_room(self, work: UnitOfWork, *, new: bool = False) -> None:
        """Raises FileTooLarge when the namespace, this file included, uses more than it may."""
        if self._limits is None:
            return
        used = work.row(_USED, {"namespace": self._namespace})
        assert used is not None, "an aggregate has one row"
        if used.bytes > self._limits.max_namespace_bytes:
            raise FileTooLarge(
                f"the files of the namespace {self._namespace!r} have more than {self._limits.max_namespace_bytes} "
                "bytes together (setting files.max_namespace_bytes); delete some"
            )
        if new and used.files >= self._limits.max_files:
            raise FileTooLarge(
                f"the namespace {self._namespace!r} has {used.files} files, and no more are accepted "
                "(setting files.max_files); delete some"
            )


def add(
    work: UnitOfWork,
    namespace: str,
    content: bytes,
    filename: str,
    purpose: str,
    keep: timedelta,
    limits: FileSettings,
) -> StoredFile:
    """Store a file that is in memory as part of another transaction. Raises FileTooLarge."""
    if len(content) > limits.max_bytes:
        raise FileTooLarge(f"the file is larger than {limits.max_bytes} bytes (setting files.max_bytes)")
    used = work.row(_USED, {"namespace": namespace})
    assert used is not None, "an aggregate has one row"
    if used.bytes + len(content) > limits.max_namespace_bytes or used.files >= limits.max_files:
        raise FileTooLarge(
            f"the namespace {namespace!r} has {used.files} files of {used.bytes} bytes, and no room for another one "
            "(settings files.max_namespace_bytes and files.max_files); delete some"
        )
    id_ = ids.new_id()
    work.execute(_BEGIN, {"id": id_, "namespace": namespace, "within": _WRITTEN_WITHIN})
    parts = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
    for number, data in enumerate(parts):
        work.execute(_APPEND, {"id": id_, "number": number, "data": data})
    work.execute(_GROW, {"id": id_, "bytes": len(content), "within": _WRITTEN_WITHIN})
    digest = hashlib.sha256(content).hexdigest()
    values = {"id": id_, "filename": filename, "purpose": purpose, "sha256": digest, "keep": keep}
    found = work.row_of(StoredFile, _FINISH, values)
    assert found is not None, "it was begun in this transaction"
    return found


def find_equal(work: UnitOfWork, namespace: str, purpose: str, content: bytes, for_: timedelta) -> StoredFile | None:
    """Return a file of the namespace with this purpose and content that is kept for at least that time, or None."""
    values = {
        "namespace": namespace,
        "purpose": purpose,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "until": for_,
    }
    return work.row_of(StoredFile, _EQUAL, values)


def whole(database: Database, id_: UUID, max_bytes: int) -> bytes:
    """Return the content of a file. Raises FileTooLarge when it has more bytes."""
    found = bytearray()
    for part in parts(database, id_):
        found += part
        if len(found) > max_bytes:
            raise FileTooLarge(f"the file has more than {max_bytes} bytes")
    return bytes(found)


def page(
    database: Database,
    namespace: str | None,
    *,
    purpose: str | None = None,
    after: UUID | None = None,
    limit: int = 100,
    newest_first: bool = True,
) -> FilePage:
    """Return files of a namespace, or of all of them."""
    conditions = [_VISIBLE]
    if namespace is not None:
        conditions.append("namespace = :namespace")
    if purpose is not None:
        conditions.append("purpose = :purpose")
    if after is not None:
        conditions.append("id < :after" if newest_first else "id > :after")
    statement = text(f"""
        SELECT {_COLUMNS} FROM file WHERE {" AND ".join(conditions)}
        ORDER BY id {"DESC" if newest_first else "ASC"} LIMIT :limit
    """)
    given = {"namespace": namespace, "purpose": purpose, "after": after, "limit": limit + 1}
    with database.work() as work:
        found = work.rows_of(StoredFile, statement, given)
    return FilePage(found[:limit], len(found) > limit)


def get(database: Database, id_: UUID | None, namespace: str | None, shown: str = "") -> StoredFile:
    """Return a file of a namespace, or of any. Raises NotFound, which names it as `shown`."""
    with database.work() as work:
        return get_in(work, id_, namespace, shown)


def get_in(
    work: UnitOfWork, id_: UUID | None, namespace: str | None, shown: str = "", *, hold: bool = False
) -> StoredFile:
    """As `get`, in a transaction. With `hold`, the file is not removed before the end of the transaction."""
    found = None if id_ is None else work.row_of(StoredFile, _HOLD if hold else _GET, {"id": id_})
    if found is None or (namespace is not None and found.namespace != namespace):
        raise NotFound("file", shown or ("" if id_ is None else shown_id(id_)))
    return found


def read(database: Database, id_: UUID, part: int) -> bytes:
    """Return a part of the content, counted from 0; nothing after its end. A part has about a megabyte."""
    with database.work() as work:
        rows = work.rows(_READ_CHUNKS, {"id": id_, "first": part * _READ, "end": (part + 1) * _READ})
    return b"".join(row.data for row in rows)


def parts(database: Database, id_: UUID) -> Iterator[bytes]:
    """Yield the content, about a megabyte at a time."""
    number = 0
    while data := read(database, id_, number):
        yield data
        number += 1


def slice_of(work: UnitOfWork, id_: UUID, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset`; fewer when the file ends before, or was removed."""
    values = {"id": id_, "offset": offset, "end": offset + length, "chunk": CHUNK_BYTES}
    return b"".join(row.data for row in work.rows(_SLICE, values))


def remove(database: Database, id_: UUID, check: Callable[[UnitOfWork], None] = lambda _: None) -> None:
    """
    Make a file invisible, then delete its content and the file.

    `check` raises when the file is used. It sees every transaction that has held the file (`get_in`).
    """
    with database.work() as work:
        work.run(_LOCK, {"id": id_})  # waits for those that hold it; the update alone would not
        check(work)
        work.execute(_EXPIRE, {"id": id_})
    _delete(database, id_, lambda: True)


def remove_expired(
    database: Database, in_time: Callable[[], bool] = lambda: True, used: Collection[UUID] = frozenset()
) -> int:
    """Delete expired files while `in_time()` is true, except those that are `used`; return their number."""
    removed, passed = 0, list(used)
    while in_time():
        with database.work() as work:
            found = [row.id for row in work.rows(_EXPIRED, {"passed": passed})]
        if not found:
            break
        for id_ in found:
            if not in_time():
                break
            removed += _delete(database, id_, in_time)
            passed.append(id_)
    return removed


def _delete(database: Database, id_: UUID, in_time: Callable[[], bool]) -> bool:
    """Delete an expired file part by part; False when the time was over before."""
    while in_time():
        with database.work() as work:
            if work.run(_DELETE_CHUNKS, {"id": id_, "limit": _DELETED}) == _DELETED:
                continue
            return bool(work.run(_DELETE, {"id": id_}))
    return False
