"""
Restoring: an archive becomes the database and the catalogue of an installation, in an empty place.

The archive is verified as a whole before anything is written. The tables are made by the migrations of this program up
to the revision of the archive, take its rows, and are upgraded to the present revision: all in one transaction, so that
a restore that fails or is killed leaves the database as empty as it was. Nothing of an archive is executed.

Hosts and pools of the archive belong to the place of the backup: they are declared lost, and agents join again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import Connection, text

from app.backup import tables, verification
from app.backup.archive import Archive
from app.backup.manifest import CATALOG_FILE, SETTINGS_FILE, BackupManifest, FilePart, check_columns, unusable
from app.catalog import catalog
from app.catalog import files as catalog_files
from app.fleet.ledger import rules, session
from app.kernel.database import Database, UnitOfWork, upgrade_within
from app.kernel.errors import Conflict, InvalidCatalog, Unavailable
from app.kernel.processes import private_file
from app.kernel.processes.data_directory import make_directory

_SETTINGS = b"""
    SET LOCAL maintenance_work_mem = '128MB'; SET LOCAL statement_timeout = 0; SET LOCAL row_security = off;
    SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL lock_timeout = 0
"""
# Indexes of vectors are made while the platform runs, and its job makes them again.
_FORGET_VECTOR_INDEXES = text("UPDATE recall_model SET is_indexed = false WHERE is_indexed")
_LOSE_HOSTS = text("UPDATE host SET lost_at = now(), agent_epoch = 0, agent_until = now() WHERE lost_at IS NULL")
_HOSTS = text("SELECT name FROM host WHERE lost_at IS NULL ORDER BY name")
_OPEN_RUNS = text("""
    SELECT state, count(*) AS runs FROM run WHERE state NOT IN ('succeeded', 'failed', 'cancelled')
    GROUP BY state ORDER BY state
""")


@dataclass(frozen=True, slots=True)
class Restored:
    """An installation that was restored."""

    manifest: BackupManifest
    #: The revision after the upgrade.
    revision: str
    #: Runs that go on, by state.
    open_runs: Mapping[str, int]
    #: Hosts of the backup, which were declared lost.
    hosts: tuple[str, ...]
    #: Settings of the place of the backup that were not defaults, by key, without secrets.
    settings: Mapping[str, Any]


def require_empty(database: Database, archive: Archive, of: BackupManifest, data_dir: Path) -> None:
    """Raise Conflict unless the database has no table and the data directory no other catalogue."""
    with database.session() as connection:
        _require_empty(_driver(connection))
    _catalog(archive, of, data_dir)


def restore(
    database: Database,
    archive: Archive,
    of: BackupManifest,
    data_dir: Path,
    progress: Callable[[str], object] = lambda _: None,
) -> Restored:
    """
    Restore a verified archive. `progress` is told the name of each table when it begins.

    Raises Conflict when the place is not empty, InvalidInput when the rows are not those of the schema, Unavailable.
    """
    own_catalog = _catalog(archive, of, data_dir)
    with database.schema() as connection:
        driver = _driver(connection)
        driver.execute(_SETTINGS)
        try:
            _require_empty(driver)
            upgrade_within(connection, of.revision)
            _load(driver, archive, of, progress)
            upgrade_within(connection)
            connection.execute(_FORGET_VECTOR_INDEXES)
        except (psycopg.errors.DataError, psycopg.errors.IntegrityError) as error:
            raise unusable("tables", str(error).strip().partition("\n")[0]) from error
        except psycopg.Error as error:
            raise Unavailable(f"the database refuses the restore: {str(error).partition(chr(10))[0]}") from error
        if own_catalog is not None:  # the last step before the commit: after a failure, the same content is accepted
            make_directory(data_dir)
            private_file.write(catalog_files.own_catalog(data_dir), own_catalog)
    with database.session() as connection:
        _driver(connection).execute("ANALYZE")
    with database.work() as work:
        hosts = _lose_hosts(work)
        open_runs = {row.state: row.runs for row in work.rows(_OPEN_RUNS)}
    revision = database.revision()
    assert revision is not None, "it was just upgraded"
    return Restored(of, revision, open_runs, hosts, _settings(archive, of))


def _require_empty(driver: psycopg.Connection[Any]) -> None:
    if not tables.is_empty(driver):
        raise Conflict(
            "the database is not empty; a restore replaces nothing: give it a database without tables (one that was "
            "created and never upgraded), or an empty data directory"
        )


def _load(
    driver: psycopg.Connection[Any], archive: Archive, of: BackupManifest, progress: Callable[[str], object]
) -> None:
    schema = tables.read_schema(driver)
    check_columns(of, schema)
    again = tables.drop_checks(driver, schema)
    for part in of.tables:
        progress(part.name)
        with driver.cursor() as cursor:
            with cursor.copy(tables.copy_in(part.name, part.columns)) as rows:
                for portion in verification.rows_of(archive, part):
                    rows.write(portion)
            if cursor.rowcount != part.rows:
                raise unusable(part.file, f"{cursor.rowcount} rows were read", f"{part.rows}, as the manifest says")
    progress("indexes")
    for statement in again:
        driver.execute(statement.encode())
    if unknown := tables.set_sequences(driver, of.sequences):
        raise unusable("sequences", f"revision {of.revision} has no sequence {', '.join(unknown)}")


def _lose_hosts(work: UnitOfWork) -> tuple[str, ...]:
    """Declare all hosts lost: their processes run elsewhere, or nowhere."""
    hosts = tuple(row.name for row in work.rows(_HOSTS))
    if hosts:
        open_ = session.open_session(work)
        for host in hosts:
            open_.change(partial(rules.declare_host_lost, host=host), "restored from a backup")
        work.run(_LOSE_HOSTS)
        open_.write()
    return hosts


def _part(of: BackupManifest, name: str) -> FilePart | None:
    return next((part for part in of.files if part.name == name), None)


def _catalog(archive: Archive, of: BackupManifest, data_dir: Path) -> str | None:
    """Return the catalogue to write, or None. Raises Conflict when another one is there."""
    part = _part(of, CATALOG_FILE)
    if part is None:
        return None
    try:
        content = verification.content_of(archive, part).decode()
        catalog.parse(content, CATALOG_FILE)
    except UnicodeDecodeError as error:
        raise unusable(CATALOG_FILE, f"it is no UTF-8: {error}") from None
    except InvalidCatalog as error:
        raise unusable(CATALOG_FILE, str(error)) from None
    path = catalog_files.own_catalog(data_dir)
    if path.exists():
        if path.read_text(encoding="utf-8", errors="replace") == content:
            return None
        raise Conflict(f"{path} exists and is not that of the backup; move it away, or choose another data directory")
    return content


def _settings(archive: Archive, of: BackupManifest) -> dict[str, Any]:
    part = _part(of, SETTINGS_FILE)
    try:
        found = json.loads(verification.content_of(archive, part)) if part is not None else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _driver(connection: Connection) -> psycopg.Connection[Any]:
    """Return the connection of psycopg, whose transaction is that of SQLAlchemy."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver
