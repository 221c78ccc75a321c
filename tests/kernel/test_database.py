"""The database: migrations match the row classes, transactions, timeouts, and outages."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import alembic.command
import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi.testclient import TestClient
from psycopg.errors import UniqueViolation
from pydantic import SecretStr
from sqlalchemy import text
from sqlmodel import SQLModel

from app.api.main import create_app
from app.fleet import rows as fleet_rows  # noqa: F401 as above
from app.footprint import measurements  # noqa: F401 registers its tables in the metadata
from app.kernel import database as databases
from app.kernel.database import Database
from app.kernel.embedded import PostgresServer, start_postgres
from app.kernel.errors import DatabaseAhead, DatabaseBehind, DatabaseUnreachable
from app.kernel.settings import Settings
from app.workflows.runs.storage import rows  # noqa: F401 as above
from app.workflows.schedules import rows as schedule_rows  # noqa: F401 as above
from tests.frozen import frozen
from workers.runtime import Resources


@pytest.fixture
def empty(database_url: str) -> Iterator[Database]:
    """An empty database."""
    admin = Database(database_url, pool_size=1)
    with admin.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("DROP DATABASE IF EXISTS fresh WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE fresh"))
    made = Database(database_url.rpartition("/")[0] + "/fresh", pool_size=2)
    yield made
    made.close()
    admin.close()


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[PostgresServer]:
    """A server for one test only."""
    server = start_postgres(tmp_path / "postgres")
    yield server
    server.stop()


def test_migrations_match_the_row_classes(empty: Database) -> None:
    empty.upgrade()

    with empty.schema() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, SQLModel.metadata) == []


def test_every_migration_can_be_reverted_and_repeated(empty: Database) -> None:
    empty.upgrade()
    with empty.schema() as connection:
        config = databases._config()
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, "base")
    assert empty.revision() is None
    empty.upgrade()
    empty.require_head()


def test_an_empty_database_is_refused_with_the_command_to_migrate_it(empty: Database) -> None:
    with pytest.raises(DatabaseBehind, match=r"none .empty.*`arriero db upgrade`"):
        empty.require_head()


def with_later_schema(database: Database, floor: str) -> None:
    """What a migration of a later version does: a table, and perhaps a floor above all that this version knows."""
    with database.work() as work:
        work.execute(text("CREATE TABLE of_later (id int)"))
        work.run(text("UPDATE alembic_version SET version_num = 'later'"))
        work.run(text("UPDATE schema_floor SET revision = :floor"), {"floor": floor})


def test_a_later_schema_that_only_adds_is_worked_with(empty: Database) -> None:
    """During a rolling upgrade the schema comes first."""
    empty.upgrade()
    with_later_schema(empty, databases.head_revision())
    empty.require_head()
    empty.upgrade()
    assert empty.revision() == "later", "it stays"


def test_a_later_schema_with_a_raised_floor_is_refused(empty: Database) -> None:
    empty.upgrade()
    with_later_schema(empty, "later")
    for call in (empty.require_head, empty.upgrade):
        with pytest.raises(DatabaseAhead, match=r"revision later of a later version.*upgrade this program"):
            call()


def test_api_and_workers_refuse_a_schema_of_another_revision(empty: Database, redis_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url=SecretStr(empty.url), redis_url=SecretStr(redis_url))

    with pytest.raises(DatabaseBehind):
        create_app(settings)
    with pytest.raises(DatabaseBehind):
        Resources.open(settings, lambda _: 1)

    empty.upgrade()
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        assert client.get("/readyz").status_code == 200


def test_a_failed_transaction_stores_and_sends_nothing(database: Database) -> None:
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


def test_a_failed_statement_without_a_reader_fails_the_commit(database: Database) -> None:
    insert, sent = text("INSERT INTO definition (sha256, document) VALUES ('x', '{}')"), list[str]()

    def insert_twice() -> None:
        with database.work() as work:
            work.after_commit(lambda: sent.append("message"))
            work.execute(insert)
            work.execute(insert)

    with pytest.raises(UniqueViolation):
        insert_twice()
    with database.work() as work:
        assert (work.rows(text("SELECT * FROM definition")), sent) == ([], [])


def test_results_may_be_read_later_and_in_any_order(database: Database) -> None:
    with database.work() as work:
        work.execute(
            text("INSERT INTO definition (sha256, document) VALUES (:name, '{}')"), [{"name": "x"}, {"name": "y"}]
        )
        one, two = (work.execute(text("SELECT count(*) + :n AS n FROM definition"), {"n": n}) for n in (1, 2))
        assert (two.fetchone().n, one.fetchone().n) == (4, 3)
        assert work.run(text("DELETE FROM definition")) == 2


def test_an_unreachable_database_raises_an_error_of_arriero() -> None:
    unreachable = Database("postgresql://arriero:secret@127.0.0.1:1/arriero", pool_size=1)
    with pytest.raises(DatabaseUnreachable) as caught, unreachable.work():
        pass

    assert "secret" not in str(caught.value)
    unreachable.close()


def test_connections_that_the_server_closed_are_replaced(database: Database) -> None:
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


@pytest.mark.parametrize("mib", [16, 64])
def test_a_value_of_any_size_goes_through(database: Database, mib: int) -> None:
    """The values exceed the socket's buffer: the rest is sent too."""
    statement = text("INSERT INTO payload (sha256, bytes, body) VALUES (:name, :size, :body)")
    size = mib * 2**20
    values = [{"name": name, "size": size, "body": f"{name}{'llama ' * (size // 6)}"} for name in "abc"]

    with database.work() as work:
        assert work.run(statement, values[0]) == 1
        work.execute(statement, values[1:])

    with database.work() as work:
        kept = work.rows(text("SELECT sha256, body FROM payload ORDER BY sha256"))
        assert [(row.sha256, row.body) for row in kept] == [(one["name"], one["body"]) for one in values]


@pytest.mark.parametrize("read", [True, False], ids=["a result was read", "statements were added after it"])
def test_a_session_that_is_idle_in_a_transaction_loses_its_locks(
    database: Database, monkeypatch: pytest.MonkeyPatch, *, read: bool
) -> None:
    """This is the case of a worker that is stopped with SIGSTOP in the middle of a transaction."""
    insert = text("INSERT INTO definition (sha256, document) VALUES (:name, '{}')")
    update = text("UPDATE definition SET document = :document WHERE sha256 = 'x'")
    with database.work() as work:
        work.run(insert, {"name": "x"})
    monkeypatch.setitem(databases._SERVER, "idle_in_transaction_session_timeout", "500ms")
    idle = Database(database.url, pool_size=1)

    def stay_idle() -> None:
        with idle.work() as work:
            work.row(text("SELECT sha256 FROM definition WHERE sha256 = 'x' FOR UPDATE"))
            if not read:
                work.execute(insert, {"name": "y"})
            with database.work() as other:
                assert other.run(update, {"document": '{"by": "other"}'}) == 1
            work.run(update, {"document": '{"by": "idle"}'})

    with pytest.raises(DatabaseUnreachable):
        stay_idle()
    with database.work() as work:
        assert [row.document for row in work.rows(text("SELECT document FROM definition"))] == [{"by": "other"}]
    idle.close()


def test_the_answer_timeout_limits_the_wait_for_locks_and_connections(database: Database) -> None:
    limited = Database(database.url, pool_size=1, answer_timeout=timedelta(seconds=1))
    with database.work() as work:
        work.run(text("LOCK TABLE definition"))
        with pytest.raises(DatabaseUnreachable, match="locked by another transaction"), limited.work() as waiting:
            waiting.rows(text("SELECT * FROM definition"))

    with (
        limited.work(),
        limited.work(),
        pytest.raises(DatabaseUnreachable, match="connections are in use"),
        limited.work(),
    ):
        pass
    limited.close()


def test_a_read_only_server_counts_as_unreachable_and_is_reconnected(database: Database) -> None:
    """After a fail-over, the old connections lead to a standby."""
    other = Database(database.url, pool_size=1)
    insert = text("INSERT INTO definition (sha256, document) VALUES ('x', '{}')")

    def write_to_a_standby() -> None:
        with other.work() as work:
            work.run(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
            work.run(text("SET TRANSACTION READ ONLY"))
            work.run(insert)

    with pytest.raises(DatabaseUnreachable, match="read-only"):
        write_to_a_standby()
    with other.work() as work:
        assert work.run(insert) == 1
    other.close()


def test_a_block_must_not_continue_after_a_failed_statement(database: Database) -> None:
    """The server turns the COMMIT of such a transaction into a ROLLBACK without an error."""

    def continue_anyway() -> None:
        with database.work() as work:
            work.after_commit(lambda: pytest.fail("nothing was committed"))
            with contextlib.suppress(psycopg.Error):
                work.run(text("SELECT 1 / 0"))

    with pytest.raises(AssertionError, match="has failed"):
        continue_anyway()


def test_a_silent_server_is_given_up_and_reconnected(postgres: PostgresServer) -> None:
    """All its processes are frozen: waiting callers time out, and the next are refused at once, until it answers."""
    database = Database(postgres.url, pool_size=2, answer_timeout=timedelta(seconds=2))
    with database.work() as work:
        work.run(text("CREATE TABLE t (a int)"))

    def refused(why: str) -> float:
        begun = time.monotonic()
        with pytest.raises(DatabaseUnreachable, match=why), database.work() as work:
            work.run(text("INSERT INTO t VALUES (1)"))
        return time.monotonic() - begun

    with frozen(postgres.pid):
        assert 2 <= refused("no answer for 2 s") < 10
        assert refused("does not answer") < 1
        pause = threading.Event()
        while (took := refused("answer|timeout")) < 1:
            pause.wait(0.02)
        assert took < 15, "a new connection times out, too"

    def seen() -> list[Any] | None:
        with contextlib.suppress(DatabaseUnreachable), database.work() as work:
            return work.rows(text("SELECT a FROM t"))
        return None

    limit = time.monotonic() + 60
    while (found := seen()) is None:
        assert time.monotonic() < limit
        pause.wait(0.02)
    assert found == []
    database.close()


def test_rows_are_returned_as_objects_of_a_class(database: Database) -> None:
    @dataclass(frozen=True, slots=True)
    class Pair:
        number: int
        word: str | None

    query = text("SELECT n AS number, CASE WHEN n > :limit THEN 'more' END AS word FROM generate_series(1, 2) AS n")
    with database.work() as work:
        assert work.rows_of(Pair, query, {"limit": 1}) == [Pair(1, None), Pair(2, "more")]
        assert work.row_of(Pair, query, {"limit": 2}) == Pair(1, None)
        assert work.row_of(Pair, text("SELECT 1 AS number, 'a' AS word WHERE false")) is None
        with pytest.raises(TypeError, match="extra"):
            work.row_of(Pair, text("SELECT 1 AS number, 'a' AS word, 2 AS extra"))


def test_idle_connections_are_closed(database: Database) -> None:
    """A process that does nothing has none; the next call makes one."""
    own = Database(database.url, pool_size=2)
    counted = text("SELECT count(*) AS sessions FROM pg_stat_activity WHERE application_name = 'idle'")
    named = text("SET application_name = 'idle'")

    def sessions() -> int:
        with database.work() as work:
            row = work.row(counted)
            assert row is not None
            return int(row.sessions)

    try:
        for _ in range(2):
            with own.work() as first, own.work() as second, own.work() as third:
                for work in (first, second, third):
                    work.run(named)
            assert own.engine.pool.checkedin() <= 2, "a third connection is closed when it is returned"
            pause = threading.Event()
            assert any(sessions() == 0 or pause.wait(0.1) for _ in range(600))
    finally:
        own.close()


def test_connections_of_a_discarded_pool_are_closed_when_they_are_returned(database_url: str) -> None:
    database = Database(database_url, pool_size=2)
    with database._session() as borrowed:
        with contextlib.suppress(DatabaseUnreachable), database.work() as work:
            work.connection.close()
            work.row(text("SELECT 1"))
        assert not borrowed.closed
    assert borrowed.closed
    database.close()


def test_a_statement_works_after_a_pipeline_that_would_have_prepared_it_was_aborted(database_url: str) -> None:
    """The server prepares nothing in a pipeline that was aborted; psycopg has to forget what it believes."""
    database = Database(database_url, pool_size=1)
    broken, kept = text("SELECT 1 / 0"), text("SELECT 1 AS one")
    for number in range(30):
        with contextlib.suppress(psycopg.errors.DivisionByZero), database.work() as work:
            if number % 3 == 0:
                work.execute(broken)
            work.execute(kept)
        with database.work() as work:
            assert work.rows(kept)[0].one == 1, number
    database.close()
