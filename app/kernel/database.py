"""
The database: the connection pool, the unit of work, and the check of the schema's revision.

One service call is one transaction. Actions that must follow a commit, such as a message to the broker, wait for it.
When a message cannot be sent, this is logged and the sweep sends it later.
The server ends a session that stays idle in a transaction, which releases its locks. With an answer
timeout, a server that does not answer is given up after it, and callers are refused at once until it answers again.
Only the database's clock decides about timestamps, leases and delays: the clocks of hosts differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, lru_cache
from typing import Any, TypeVar

import alembic.command
import psycopg
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg.pq import TransactionStatus
from psycopg.rows import RowFactory, class_row, namedtuple_row
from sqlalchemy import Connection, Engine, TextClause, create_engine, event, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import Pool
from sqlmodel import SQLModel

from app.kernel import log, shipped
from app.kernel.errors import DatabaseAhead, DatabaseBehind, DatabaseDenied, DatabaseUnreachable
from app.kernel.postgres import address, pooler
from app.kernel.postgres.breaker import Breaker
from app.kernel.postgres.connection import AnswerTimeout
from app.kernel.postgres.connection import Connection as Session
from app.kernel.postgres.idle_pool import IdlePool

_log = log.get(__name__)

#: Advisory lock that serialises migrations when several hosts start at once. A backup holds it shared.
MIGRATION_LOCK = 7_205_759_403_792

#: Constraint names are derived from the tables, so that migrations can refer to them.
SQLModel.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

#: After 15 s without an answer, a peer that is disconnected or whose machine is gone is detected: the client closes the
#: connection, and the server ends the session and releases its locks. By default, TCP needs 15 minutes for the first
#: and hours for the second.
_CLIENT = {"keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 2, "tcp_user_timeout": 15_000}
_SERVER = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "2",
    "tcp_user_timeout": "15000",
    **pooler.REQUIRED,
    # A long query is ended when its client is gone.
    "client_connection_check_interval": "5s",
}
#: Timeout in seconds for making a connection.
_CONNECT_TIMEOUT = 5
#: The lock timeout as a share of the answer timeout, when there is one.
_LOCK_TIMEOUT_SHARE = 0.8
#: Interval of probes while the server does not answer.
_PROBE_INTERVAL = timedelta(seconds=1)

#: Errors that are raised as DatabaseUnreachable.
_UNREACHABLE = (
    psycopg.OperationalError,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.ReadOnlySqlTransaction,
    OperationalError,
    PoolTimeout,
)
_BEGIN, _COMMIT = text("BEGIN"), text("COMMIT")

Parameters = Mapping[str, Any]
T = TypeVar("T")
#: Translates the `:name` parameters of statements to psycopg's format.
_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call] # unknown to the stubs


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The result of a statement. Reading it sends all pending statements and waits for all their answers."""

    _work: UnitOfWork
    _cursor: psycopg.Cursor[Any]

    def fetchone(self) -> Any | None:
        """Return the next row, or None."""
        self._work.flush()
        return self._cursor.fetchone()

    def fetchall(self) -> list[Any]:
        """Return all remaining rows."""
        self._work.flush()
        return self._cursor.fetchall()

    def status(self) -> str | None:
        """Return the server's status message, such as `COMMIT`, once the statement was answered."""
        return self._cursor.statusmessage

    def row_count(self) -> int:
        """Return how many rows the statement affected or returned."""
        self._work.flush()
        return self._cursor.rowcount


@dataclass(frozen=True, slots=True)
class UnitOfWork:
    """
    One transaction, and the actions that follow its commit.

    Statements are pipelined: they are sent together when a result is read, or at the commit. Each statement sees the
    effects of those before it, and waits for locks after them, as if they had been sent one by one.
    """

    connection: Session
    pipeline: psycopg.Pipeline
    _breaker: Breaker
    _unsent: list[tuple[psycopg.Cursor[Any], str, Any]] = field(default_factory=list)
    _after: list[Callable[[], object]] = field(default_factory=list)

    def after_commit(self, action: Callable[[], object]) -> None:
        """Run `action` after the commit; never after a rollback."""
        self._after.append(action)

    def execute(
        self, statement: TextClause, parameters: Parameters | Sequence[Parameters] | None = None
    ) -> QueryResult:
        """
        Add a statement to the pipeline; with a list of parameters, it is executed once for each.

        A failure is raised when the next result is read, at the latest by the commit.
        """
        return self._add(statement, parameters, namedtuple_row)

    def _add(
        self,
        statement: TextClause,
        parameters: Parameters | Sequence[Parameters] | None,
        row_factory: RowFactory[Any],
    ) -> QueryResult:
        cursor = self.connection.cursor(row_factory=row_factory)
        self._unsent.append((cursor, _sql(statement), {} if parameters is None else parameters))
        return QueryResult(self, cursor)

    def rows(self, statement: TextClause, parameters: Parameters | None = None) -> list[Any]:
        """Execute a statement and return all its rows."""
        return self.execute(statement, parameters).fetchall()

    def row(self, statement: TextClause, parameters: Parameters | None = None) -> Any | None:
        """Execute a statement and return its first row, or None."""
        return self.execute(statement, parameters).fetchone()

    def execute_of(self, type_: type[Any], statement: TextClause, parameters: Parameters | None = None) -> QueryResult:
        """As `execute`, with the rows as objects of a class whose fields have the names of the columns."""
        return self._add(statement, parameters, class_row(type_))

    def rows_of(self, type_: type[T], statement: TextClause, parameters: Parameters | None = None) -> list[T]:
        """Execute a statement and return its rows as objects of a class whose fields have the names of the columns."""
        found: list[T] = self._add(statement, parameters, class_row(type_)).fetchall()
        return found

    def row_of(self, type_: type[T], statement: TextClause, parameters: Parameters | None = None) -> T | None:
        """Execute a statement and return its first row as an object of such a class, or None."""
        found: T | None = self._add(statement, parameters, class_row(type_)).fetchone()
        return found

    def run(self, statement: TextClause, parameters: Parameters | Sequence[Parameters] | None = None) -> int:
        """Execute a statement and return the number of affected rows."""
        return self.execute(statement, parameters).row_count()

    def flush(self) -> None:
        """
        Send all pending statements, and wait for all answers.

        A sync follows the statements. Until the server sees it, it expects further statements at once and does not
        measure how long the client is idle; so nothing is sent without a sync (app/decisions.md, 31).
        """
        if self._unsent:
            self.send()
            self.pipeline.sync()
            self._breaker.answered()

    def send(self) -> None:
        """Send all pending statements. The caller must sync next."""
        unsent = self._unsent.copy()
        self._unsent.clear()
        self.connection.send(unsent)


class Database:
    """A pool of connections to Postgres. Those that are not used for a second are closed."""

    def __init__(self, url: str, *, pool_size: int = 8, answer_timeout: timedelta | None = None) -> None:
        """
        Create the pool without connecting. Up to twice `pool_size` transactions can be open at once.

        `answer_timeout` limits the wait for an answer, for a free connection and for a lock. Without it, the wait for
        an answer has no limit, and the others end after 30 s.
        """
        self.url = url
        self._timeout = None if answer_timeout is None else answer_timeout.total_seconds()
        self._breaker = Breaker(_PROBE_INTERVAL)
        locks = {} if self._timeout is None else {"lock_timeout": f"{self._timeout * _LOCK_TIMEOUT_SHARE * 1000:.0f}"}
        self._options = " ".join(f"-c {k}={v}" for k, v in (_SERVER | locks).items())
        # Transactions begin explicitly: `work` sends BEGIN, and `schema` sets another isolation level.
        self.engine: Engine = create_engine(
            make_url(url).set(drivername="postgresql+psycopg"),
            poolclass=IdlePool,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=False,
            pool_timeout=30 if self._timeout is None else self._timeout,
            isolation_level="AUTOCOMMIT",
            connect_args={"connect_timeout": _CONNECT_TIMEOUT, "options": self._options} | _CLIENT,
        )
        event.listen(self.engine, "do_connect", _connect)

    @contextmanager
    def work(self) -> Iterator[UnitOfWork]:
        """
        Run the block in one transaction: committed at its end, rolled back when it raises.

        Raises DatabaseUnreachable when no connection is available or it is lost. Whether a commit in progress took
        effect is then unknown, so callers make their writes conditional on the state that they replace. Raises
        DatabaseDenied when the role of this process lacks a right.
        """
        if not self._breaker.admits():
            raise DatabaseUnreachable("the database does not answer")
        try:
            with self._session() as connection:
                with connection.pipeline() as pipeline:
                    work = UnitOfWork(connection, pipeline, self._breaker)
                    work.execute(_BEGIN)
                    yield work
                    committed = work.execute(_COMMIT)
                    work.send()  # the end of the pipeline is a sync
                assert committed.status() == "COMMIT", "the block must not continue after a statement has failed"
        except (AnswerTimeout, psycopg.errors.ConnectionTimeout) as error:
            self._breaker.timed_out(error.seconds if isinstance(error, AnswerTimeout) else _CONNECT_TIMEOUT)
            raise DatabaseUnreachable(_reason(error)) from error
        except psycopg.errors.InsufficientPrivilege as error:
            raise DatabaseDenied(f"the database does not allow it: {str(error).splitlines()[0]}") from error
        except _UNREACHABLE as error:
            raise DatabaseUnreachable(_reason(error)) from error
        self._breaker.answered()
        for action in work._after:
            action()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """Borrow a connection from the pool; it is returned without an open transaction."""
        pool = self.engine.pool
        pooled = pool.connect()
        connection = pooled.driver_connection
        assert isinstance(connection, Session)
        connection.answer_timeout = self._timeout
        try:
            yield connection
        except psycopg.errors.ReadOnlySqlTransaction:
            # The server is a standby, now or when the connection was made: a new connection may reach the primary.
            connection.close()
            raise
        finally:
            self._return(pooled, connection, pool)

    def _return(self, pooled: Any, connection: Session, pool: Pool) -> None:
        """Return a connection. When it was lost, the whole pool is discarded: its connections have no server either."""
        if connection.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
            try:
                # Not execute("ROLLBACK"): psycopg would keep the names of statements that it prepared in this
                # transaction, and the server has prepared none of them if the pipeline was aborted before.
                connection.rollback()
            except psycopg.Error:
                connection.close()
        connection.answer_timeout = None
        if connection.closed:
            _log.warning("database_connection_lost")
            pooled.invalidate()
            if self.engine.pool is pool:
                self.engine.dispose()
        pooled.close()
        if self.engine.pool is not pool:
            # What was borrowed from a discarded pool is returned to it, and nothing else would close it.
            pool.dispose()

    def conninfo(self) -> str:
        """Return the connection string for psycopg itself, for connections outside the pool (LISTEN)."""
        return address.conninfo(self.url, _CLIENT)

    def upgrade(self, revision: str = "head") -> None:
        """
        Migrate the schema to `revision`. Several processes may call this at once: they wait for each other.

        That of a later version stays as it is, if this one works with it. Raises DatabaseAhead otherwise.
        """
        current = self.revision()
        if current is not None and current not in _revisions():
            self.require_head()
            return
        with self.schema() as connection:
            upgrade_within(connection, revision)

    def revision(self) -> str | None:
        """Return the revision of the schema, or None when the database is empty."""
        with self.work() as work:
            table = work.row(text("SELECT to_regclass('alembic_version') AS name"))
            row = work.row(text("SELECT version_num FROM alembic_version")) if table and table.name else None
            return row and row.version_num

    @contextmanager
    def schema(self) -> Iterator[Connection]:
        """
        Run the block in a transaction of SQLAlchemy, for code that reads or changes the schema.

        Raises DatabaseUnreachable.
        """
        try:
            with self.engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
                yield connection
        except (OperationalError, PoolTimeout) as error:
            raise DatabaseUnreachable(_reason(error)) from error

    @contextmanager
    def session(self) -> Iterator[Connection]:
        """
        Run the block on a connection of SQLAlchemy without a transaction, for what Postgres refuses in one.

        Raises DatabaseUnreachable.
        """
        try:
            with self.engine.connect() as connection:
                yield connection
        except (OperationalError, PoolTimeout) as error:
            raise DatabaseUnreachable(_reason(error)) from error

    def require_head(self) -> None:
        """
        Check that programs of this version work with the schema.

        They do at their own revision, and at that of a later version whose floor they know: during a rolling upgrade
        the schema is migrated before the programs. Raises DatabaseBehind, DatabaseAhead.
        """
        current, head = self.revision(), head_revision()
        if current == head:
            return
        if current is None or current in _revisions():
            raise DatabaseBehind(current, head)
        with self.work() as work:
            floor = work.row(text("SELECT revision FROM schema_floor"))
        if floor is None or floor.revision not in _revisions():
            raise DatabaseAhead(current, head)
        _note_later(current, head)

    def require_fit(self) -> None:
        """Check that no pooler takes away what the programs need. Raises UnfitPooler, DatabaseUnreachable."""
        pooler.require_fit(self.conninfo(), self._options)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def open_at_head(url: str, *, pool_size: int, answer_timeout: timedelta | None = None) -> Database:
    """
    Return the database after checking that its schema has the revision that this version needs.

    The arguments are those of Database.

    Raises DatabaseBehind, DatabaseUnreachable, UnfitPooler.
    """
    database = Database(url, pool_size=pool_size, answer_timeout=answer_timeout)
    try:
        database.require_fit()
        database.require_head()
    except BaseException:
        database.close()
        raise
    return database


def upgrade_within(connection: Connection, revision: str = "head") -> None:
    """Migrate the schema in the transaction of this connection, after those that others migrate now."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
    config = _config()
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, revision)


@cache
def known_revisions() -> frozenset[str]:
    """Return all revisions from which this version can upgrade, and its own."""
    return frozenset(script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions())


@cache
def head_revision() -> str:
    """Return the revision that this version needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "there is at least one migration"
    return head


@cache
def _note_later(current: str, head: str) -> None:
    """Log once that the schema is of a later version."""
    _log.warning("schema_of_a_later_version", revision=current, own=head)


@cache
def _revisions() -> frozenset[str]:
    """Return the revisions that this version knows."""
    return frozenset(one.revision for one in ScriptDirectory.from_config(_config()).walk_revisions())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(shipped.folder("alembic")).replace("%", "%%"))
    return config


@lru_cache(maxsize=512)
def _sql(statement: TextClause) -> str:
    """Return the statement in the format of psycopg."""
    return str(statement.compile(dialect=_DIALECT))


def _connect(_: Any, __: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> Session:
    """Make a connection for SQLAlchemy."""
    return Session.connect(*arguments, **named)


def _reason(error: Exception) -> str:
    if isinstance(error, PoolTimeout):
        return "the database is unreachable: all connections are in use"
    cause = error.orig if isinstance(error, OperationalError) else error
    reason = str(cause).strip().splitlines()[0]
    if isinstance(cause, psycopg.errors.LockNotAvailable):
        return f"the data is locked by another transaction: {reason}"
    return f"the database is unreachable: {reason}"
