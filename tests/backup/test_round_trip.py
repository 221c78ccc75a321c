"""What is saved is what is restored, for any content; and a place that is not empty keeps what it has."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from app.backup import archive, restoring, saving, verification
from app.backup.manifest import BackupManifest
from app.backup.restoring import Restored
from app.kernel.database import Database, head_revision
from app.kernel.errors import Conflict, InvalidInput
from tests.backup.conftest import content_of

CATALOG = '[[models]]\nname = "mine:1b"\nuse_cases = ["chat"]\nsource = { path = "/nowhere/mine.gguf" }\n'
#: What a restore changes: the fleet of the place of the backup is gone, and vector indexes are made again.
CHANGED = {"host", "device", "reservation", "reservation_device", "recall_model", "sequences"}


def restored(source: Path, database: Database, data_dir: Path) -> Restored:
    with archive.opened(source) as opened:
        of = verification.read_manifest(opened)
        verification.verify(opened, of)
        restoring.require_empty(database, opened, of, data_dir)
        return restoring.restore(database, opened, of, data_dir)


def manifest_of(source: Path) -> BackupManifest:
    with archive.opened(source) as opened:
        return verification.read_manifest(opened)


@pytest.mark.parametrize("name", ["backup", "backup.tar"])
def test_a_restored_database_has_the_same_rows(
    filled: Database, new_database: Callable[[], Database], tmp_path: Path, name: str
) -> None:
    """In both forms, with the catalogue; readable by nobody else; the fleet of the backup's place is lost."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "catalog.toml").write_text(CATALOG)
    before = content_of(filled)

    saved = saving.save(filled, tmp_path / name, here, {"runs.lease": "15s"})
    target = new_database()
    done = restored(tmp_path / name, target, there)

    after = content_of(target)
    assert {table for table in before if after[table] != before[table]} <= CHANGED
    assert after["run"][0] == 2
    assert after["passage_vector"] == before["passage_vector"]
    assert after["sequences"] == before["sequences"]
    assert saved.manifest.rows == sum(of[0] for table, of in before.items() if table != "sequences")
    assert (there / "catalog.toml").read_text() == CATALOG
    assert done.settings == {"runs.lease": "15s"}
    assert done.hosts == ("h",)
    assert sum(done.open_runs.values()) == 2
    with psycopg.connect(target.conninfo()) as connection:
        assert connection.execute("SELECT state FROM reservation").fetchall() == [("released",)]
        assert connection.execute("SELECT charged_bytes FROM device").fetchall() == [(0,)]
        assert connection.execute("SELECT is_indexed FROM recall_model").fetchall() == [(False,)]
        checks = "SELECT count(*) FROM pg_constraint WHERE contype = 'f'", "SELECT count(*) FROM pg_indexes"
        with psycopg.connect(filled.conninfo()) as own:
            for query in checks:
                assert connection.execute(query).fetchone() == own.execute(query).fetchone()
    files = [tmp_path / name, *(tmp_path / name).glob("*")]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} <= {0o600, 0o700}
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def test_what_is_removed_meanwhile_is_in_the_backup(
    filled: Database, new_database: Callable[[], Database], tmp_path: Path
) -> None:
    """A clean-up that deletes runs, payloads and files while the tables are read changes nothing in the archive."""
    before = content_of(filled)
    deleted = []

    def clean_up(table: str) -> None:
        if not deleted:
            with psycopg.connect(filled.conninfo()) as connection:
                tables = ("run", "payload", "file")
                deleted.extend(connection.execute(f"DELETE FROM {one}".encode()).rowcount for one in tables)

    saved = saving.save(filled, tmp_path / "b.tar", tmp_path, {}, clean_up)

    assert min(deleted) > 0
    assert {part.name: part.rows for part in saved.manifest.tables} == {
        table: of[0] for table, of in before.items() if table != "sequences"
    }
    target = new_database()
    restored(tmp_path / "b.tar", target, tmp_path / "there")
    assert content_of(target)["payload"] == before["payload"]


def test_an_older_schema_is_upgraded_with_its_rows(new_database: Callable[[], Database], tmp_path: Path) -> None:
    """The rows of a schema of months ago are restored under it, and carried to the present one."""
    old, target = new_database(), new_database()
    old.upgrade("0009")
    with psycopg.connect(old.conninfo()) as connection:
        connection.execute("""
            INSERT INTO quota (namespace, weight, held_bytes, period_seconds, period_began, device_seconds,
                               attained_seconds, counted_at)
            VALUES ('research', 2.5, 0, 86400, now(), 0, 0, now())
        """)
    saving.save(old, tmp_path / "old", tmp_path, {})

    done = restored(tmp_path / "old", target, tmp_path / "there")

    assert manifest_of(tmp_path / "old").revision == "0009"
    assert done.revision == target.revision() == head_revision()
    with psycopg.connect(target.conninfo()) as connection:
        assert ("research", 2.5) in connection.execute("SELECT namespace, weight FROM quota").fetchall()


def test_nothing_is_replaced(filled: Database, new_database: Callable[[], Database], tmp_path: Path) -> None:
    """Neither a file or folder at the destination, nor a database with tables, nor another catalogue."""
    (tmp_path / "catalog.toml").write_text(CATALOG)
    (tmp_path / "taken.tar").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("taken.tar", "link"):
        with pytest.raises(Conflict, match="replaces nothing"):
            saving.save(filled, tmp_path / name, tmp_path, {})
    assert (tmp_path / "taken.tar").read_text() == "mine"
    saving.save(filled, tmp_path / "b", tmp_path, {})

    before = content_of(filled)
    with pytest.raises(Conflict, match="database is not empty"):
        restored(tmp_path / "b", filled, tmp_path / "there")
    assert content_of(filled) == before

    there = tmp_path / "there"
    there.mkdir()
    (there / "catalog.toml").write_text("# mine\n")
    target = new_database()
    with pytest.raises(Conflict, match="not that of the backup"):
        restored(tmp_path / "b", target, there)
    assert target.revision() is None
    assert (there / "catalog.toml").read_text() == "# mine\n"


def test_a_failed_backup_leaves_nothing(filled: Database, tmp_path: Path) -> None:
    def fail(table: str) -> None:
        if table == "run":
            raise KeyboardInterrupt

    for name in ("b", "b.tar"):
        with pytest.raises(KeyboardInterrupt):
            saving.save(filled, tmp_path / name, tmp_path, {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_backup_during_an_upgrade_is_refused(filled: Database, tmp_path: Path) -> None:
    with filled.schema() as connection:
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7205759403792)")
        with pytest.raises(Conflict, match="being upgraded"):
            saving.save(filled, tmp_path / "b", tmp_path, {})


def test_wrong_rows_leave_the_database_empty(
    filled: Database, new_database: Callable[[], Database], tmp_path: Path
) -> None:
    """An archive with right digests and rows that break a foreign key: the transaction takes all of it back."""
    with psycopg.connect(filled.conninfo()) as connection:  # rows that no foreign key holds together any more
        connection.execute("ALTER TABLE file_chunk DROP CONSTRAINT fk_file_chunk_file_id_file")
        connection.execute("DELETE FROM file")
    try:
        saving.save(filled, tmp_path / "b", tmp_path, {})
    finally:
        with psycopg.connect(filled.conninfo()) as connection:
            connection.execute("DELETE FROM file_chunk")
            connection.execute("""
                ALTER TABLE file_chunk ADD CONSTRAINT fk_file_chunk_file_id_file
                FOREIGN KEY (file_id) REFERENCES file (id) ON DELETE CASCADE
            """)
    target = new_database()
    with pytest.raises(InvalidInput, match="fk_file_chunk_file_id_file"):
        restored(tmp_path / "b", target, tmp_path / "there")
    assert target.revision() is None
    assert not (tmp_path / "there").exists()
