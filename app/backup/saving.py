"""
Saving: one snapshot of the database becomes an archive, while everything runs.

All rows are those of one instant: a transaction that reads only, and sees nothing of what is written or removed after
its begin. Payloads, files of users and vectors are rows too, so that whatever a row refers to is in the archive.
The database is not changed, and no other transaction waits, except upgrades of the schema.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg

from app import __version__
from app.backup import archive, manifest, tables
from app.backup.archive import ArchiveWriter
from app.backup.manifest import BackupManifest, FilePart, TablePart
from app.catalog import files as catalog_files
from app.kernel.database import MIGRATION_LOCK, Database, known_revisions
from app.kernel.errors import Conflict, DatabaseBehind, DatabaseUnreachable, Unavailable

#: The level of zlib. Level 6 takes twice the time of level 1, and makes a fifth less (docs/backup.md).
_LEVEL = 1
#: Rows are compressed in portions of so many bytes.
_PORTION = 256 * 1024
_CONNECT_TIMEOUT = 10

#: For the transaction of the snapshot alone. Rows are never filtered by policies: they are refused as a whole then.
_OPTIONS = """
    SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL row_security = off;
    SET LOCAL timezone = 'UTC'; SET LOCAL datestyle = 'ISO'; SET LOCAL intervalstyle = 'postgres';
    SET LOCAL extra_float_digits = 1; SET LOCAL bytea_output = 'hex'
"""
_RUNS = "SELECT state, count(*) FROM run GROUP BY state ORDER BY state"


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete backup."""

    path: Path
    manifest: BackupManifest
    #: SHA-256 of the manifest, which has those of all parts. Kept elsewhere, it shows that the backup is the same one.
    digest: str


def save(
    database: Database,
    destination: Path,
    data_dir: Path,
    settings: Mapping[str, Any],
    progress: Callable[[str], object] = lambda _: None,
) -> Saved:
    """
    Write a backup to a folder, or to a tar file when `destination` ends in `.tar`.

    `settings` are stored for people, so they must have no secrets. `progress` is told the name of each table when it
    begins.

    Raises Conflict when the destination exists or the schema is being upgraded, DatabaseBehind when its revision is
    unknown here, DatabaseUnreachable, and Unavailable when the destination cannot be written.
    """
    catalog = _catalog(data_dir)
    with archive.created(destination) as writer, _snapshot(database) as (connection, at):
        revision = _revision(connection)
        schema = tables.read_schema(connection)
        tables.lock_for_reading(connection, list(schema))
        stored = []
        for name, columns in schema.items():
            progress(name)
            stored.append(_save_table(connection, writer, name, columns))
        files = [_save_file(writer, name, content) for name, content in _contents(catalog, settings).items()]
        made = BackupManifest(
            created_at=at,
            arriero=__version__,
            postgres=str(connection.info.parameter_status("server_version"))[:200],
            revision=revision,
            tables=tuple(stored),
            sequences=tuple(tables.read_sequences(connection)),
            files=tuple(files),
            runs=dict(connection.execute(_RUNS).fetchall()) if "run" in schema else {},
        )
        content = manifest.encode(made)
        with writer.file(manifest.MANIFEST_FILE) as write:
            write(content)
    return Saved(destination.absolute(), made, hashlib.sha256(content).hexdigest())


@contextmanager
def _snapshot(database: Database) -> Iterator[tuple[psycopg.Connection[Any], datetime]]:
    """Yield a connection in a transaction that sees the database of one instant, and this instant."""
    try:
        with psycopg.connect(database.conninfo(), autocommit=True, connect_timeout=_CONNECT_TIMEOUT) as connection:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            connection.execute(_OPTIONS.encode())
            row = connection.execute("SELECT now(), pg_try_advisory_xact_lock_shared(%s)", [MIGRATION_LOCK]).fetchone()
            assert row is not None, "it is one row"
            if not row[1]:
                raise Conflict("the schema of the database is being upgraded; make the backup before or after that")
            yield connection, row[0]
            connection.execute("COMMIT")
    except psycopg.OperationalError as error:
        raise DatabaseUnreachable(f"the database is unreachable: {_first_line(error)}") from error
    except psycopg.Error as error:
        raise Unavailable(f"the database refuses to be read as a whole: {_first_line(error)}") from error


def _revision(connection: psycopg.Connection[Any]) -> str:
    if connection.execute("SELECT to_regclass(%s)", [tables.REVISION_TABLE]).fetchone() == (None,):
        raise Conflict("the database is empty; there is nothing to save")
    row = connection.execute(f"SELECT version_num FROM {tables.REVISION_TABLE}".encode()).fetchone()
    if row is None or row[0] not in known_revisions():
        raise DatabaseBehind(None if row is None else row[0], f"one of up to {max(known_revisions())}")
    return str(row[0])


def _save_table(connection: psycopg.Connection[Any], writer: ArchiveWriter, name: str, columns: list[str]) -> TablePart:
    digest, compressor = hashlib.sha256(), zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    size = stored = rows = 0
    portion = bytearray()
    with writer.file(f"{name}{manifest.TABLE_SUFFIX}") as write, connection.cursor() as cursor:

        def put(compressed: bytes) -> None:
            nonlocal stored
            if compressed:
                stored += len(compressed)
                digest.update(compressed)
                write(compressed)

        with cursor.copy(tables.copy_out(name, columns)) as rows_out:
            for row in rows_out:
                rows += 1
                portion += row
                if len(portion) >= _PORTION:
                    size += len(portion)
                    put(compressor.compress(portion))
                    portion.clear()
        size += len(portion)
        put(compressor.compress(portion))
        put(compressor.flush())
    return TablePart(
        name=name, columns=tuple(columns), rows=rows, bytes=size, stored_bytes=stored, sha256=digest.hexdigest()
    )


def _save_file(writer: ArchiveWriter, name: str, content: bytes) -> FilePart:
    with writer.file(name) as write:
        write(content)
    return FilePart.model_validate(
        {"name": name, "stored_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    )


def _catalog(data_dir: Path) -> bytes | None:
    path = catalog_files.own_catalog(data_dir)
    try:
        with path.open("rb") as file:
            content = file.read(manifest.MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > manifest.MAX_FILE_BYTES:
        raise Unavailable(f"{path} has more than {manifest.MAX_FILE_BYTES} bytes, which no backup takes")
    return content


def _contents(catalog: bytes | None, settings: Mapping[str, Any]) -> dict[str, bytes]:
    shown = json.dumps(dict(settings), indent=1, ensure_ascii=False, default=str, sort_keys=True).encode()
    return {manifest.SETTINGS_FILE: shown + b"\n"} | ({} if catalog is None else {manifest.CATALOG_FILE: catalog})


def _first_line(error: psycopg.Error) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
