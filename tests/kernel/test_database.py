"""The schema: rows and migrations agree, and nothing runs on another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import alembic.command
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from psycopg.errors import UniqueViolation
from pydantic import SecretStr
from sqlalchemy import text
from sqlmodel import SQLModel

from app.api.main import create_app
from app.fleet import measurements  # noqa: F401 they enter the metadata
from app.fleet import rows as fleet_rows  # noqa: F401 they too
from app.kernel import database as databases
from app.kernel.database import Database
from app.kernel.errors import DatabaseBehind, DatabaseUnreachable
from app.kernel.settings import Settings
from app.workflows import rows  # noqa: F401 they too
from app.workflows.schedules import rows as schedule_rows  # noqa: F401 they too
from workers.application import Application


@pytest.fixture
def empty(database_url: str) -> Iterator[Database]:
    """A database with nothing in it."""
    admin = Database(database_url, pool_size=1)
    with admin.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE IF EXISTS fresh WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE fresh"))
    made = Database(database_url.rpartition("/")[0] + "/fresh", pool_size=2)
    yield made
    made.close()
    admin.close()


def test_migrations_make_what_the_rows_say(empty: Database) -> None:
    empty.upgrade()

    with empty.schema() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, SQLModel.metadata) == []


def test_every_migration_can_be_undone_and_done_again(empty: Database) -> None:
    empty.upgrade()
    with empty.schema() as connection:
        config = databases._config()
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, "base")
    assert empty.revision() is None
    empty.upgrade()
    empty.require_head()


def test_an_empty_database_is_refused_with_the_command_that_mends_it(empty: Database) -> None:
    with pytest.raises(DatabaseBehind, match=r"none .empty.*`arriero db upgrade`"):
        empty.require_head()


def test_api_and_workers_refuse_a_schema_that_is_not_theirs(empty: Database, redis_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url=SecretStr(empty.url), redis_url=SecretStr(redis_url))

    with pytest.raises(DatabaseBehind):
        create_app(settings)
    with pytest.raises(DatabaseBehind):
        Application(settings).start("w", threads=1)

    empty.upgrade()
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        assert client.get("/readyz").status_code == 200


def test_a_transaction_that_fails_leaves_nothing_and_sends_nothing(database: Database) -> None:
    sent: list[str] = []

    def fail() -> None:
        with database.work() as work:
            work.run(text("INSERT INTO definition (sha256, document) VALUES ('x', '{}')"))
            work.after_commit(lambda: sent.append("message"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.work() as work:
        assert work.rows(text("SELECT * FROM definition")) == []
        work.after_commit(lambda: sent.append("after"))
        assert sent == []

    assert sent == ["after"]


def test_a_statement_that_nobody_waits_for_fails_the_commit(database: Database) -> None:
    insert, sent = text("INSERT INTO definition (sha256, document) VALUES ('x', '{}')"), list[str]()

    def insert_twice() -> None:
        with database.work() as work:
            work.after_commit(lambda: sent.append("message"))
            work.ask(insert)
            work.ask(insert)

    with pytest.raises(UniqueViolation):
        insert_twice()
    with database.work() as work:
        assert (work.rows(text("SELECT * FROM definition")), sent) == ([], [])


def test_answers_may_be_read_later_and_in_any_order(database: Database) -> None:
    with database.work() as work:
        work.ask(text("INSERT INTO definition (sha256, document) VALUES (:name, '{}')"), [{"name": "x"}, {"name": "y"}])
        one, two = (work.ask(text("SELECT count(*) + :n AS n FROM definition"), {"n": n}) for n in (1, 2))
        assert (two.fetchone().n, one.fetchone().n) == (4, 3)
        assert work.run(text("DELETE FROM definition")) == 2


def test_a_database_that_is_away_is_our_error() -> None:
    away = Database("postgresql://arriero:secret@127.0.0.1:1/arriero", pool_size=1)
    with pytest.raises(DatabaseUnreachable) as caught, away.work():
        pass

    assert "secret" not in str(caught.value)
    away.close()


def test_connections_that_the_server_dropped_are_made_anew(database: Database) -> None:
    other = Database(database.url, pool_size=1)
    with other.work() as work:
        pid = work.row(text("SELECT pg_backend_pid() AS pid")).pid
    with database.work() as work:
        work.run(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})

    with pytest.raises(DatabaseUnreachable), other.work() as work:
        work.row(text("SELECT 1"))
    with other.work() as work:
        assert work.row(text("SELECT 1 AS one")).one == 1
    other.close()


def test_a_server_that_became_a_stand_by_counts_as_away_and_is_left(database: Database) -> None:
    """During a fail-over writes meet a read-only server; the next transaction gets another connection."""

    def connected() -> int:
        with database.work() as work:
            return int(work.row(text("SELECT pg_backend_pid() AS pid")).pid)

    def written() -> None:
        with database.work() as work:
            work.run(text("SET TRANSACTION READ ONLY"))
            work.run(text("DELETE FROM run"))

    before = connected()
    with pytest.raises(DatabaseUnreachable, match="read-only"):
        written()
    assert connected() != before
