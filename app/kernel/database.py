"""
The database: the engine, the unit of work, and whether the schema is the one that this version needs.

One service call is one transaction. What must follow a commit (a message to the broker) waits for it;
what follows and fails is logged and left to the sweep.
The server ends a session that falls silent while it holds locks. A server that falls silent is given up after the
answer timeout, where there is one, and callers are refused at once until it answers again.
Timestamps, leases and delays are judged by the database's clock alone: hosts' clocks differ, it does not.
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
from sqlalchemy.exc import TimeoutError as NoneFree
from sqlalchemy.pool import Pool
from sqlmodel import SQLModel

from app.kernel import log, shipped
from app.kernel.breaker import Breaker
from app.kernel.connection import AnswerTimeout
from app.kernel.connection import Connection as Session
from app.kernel.errors import DatabaseBehind, DatabaseUnreachable

_log = log.get(__name__)

#: Serialises migrations of several hosts that start at once.
_MIGRATION_LOCK = 7_205_759_403_792

#: Constraint names follow from the tables, so that migrations can name them.
SQLModel.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

#: After 15 s of silence a side that is cut off, or whose machine is gone, is known to be: the client lets go of the
#: connection, and the server of the session with its locks. Left alone, TCP takes a quarter of an hour for the first,
#: and hours for the second.
_CLIENT = {"keepalives_idle": 5, "keepalives_interval": 5, "keepalives_count": 2, "tcp_user_timeout": 15_000}
_SERVER = {
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "2",
    "tcp_user_timeout": "15000",
    # A process that was stopped in the middle of a transaction keeps nobody from its rows for longer. Who waits for
    # them waits longer than that.
    "idle_in_transaction_session_timeout": "20s",
    "lock_timeout": "30s",
    # What works for a client that is gone works for nobody.
    "client_connection_check_interval": "5s",
    "timezone": "UTC",
}
#: Seconds in which a connection is made.
_CONNECT = 5
#: A part of the answer timeout: whoever has one waits for locks no longer.
_LOCKS = 0.8
#: While the server is silent, it is asked this often.
_PROBE_EVERY = timedelta(seconds=1)

#: What says that the server is not there, or is not the one that writes.
_UNREACHABLE = (
    psycopg.OperationalError,
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.ReadOnlySqlTransaction,
    OperationalError,
    NoneFree,
)
_BEGIN, _COMMIT = text("BEGIN"), text("COMMIT")

Parameters = Mapping[str, Any]
T = TypeVar("T")
#: What turns a statement's `:name` into what psycopg reads.
_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call] # unknown to the stubs


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What a statement gives. Whoever reads it sends what was asked until then, and waits for all of the answers."""

    _work: UnitOfWork
    _cursor: psycopg.Cursor[Any]

    def fetchone(self) -> Any | None:
        """The next row, or None."""
        self._work.settle()
        return self._cursor.fetchone()

    def fetchall(self) -> list[Any]:
        """The rows."""
        self._work.settle()
        return self._cursor.fetchall()

    def status(self) -> str | None:
        """What the statement did, in the server's words, once it was answered."""
        return self._cursor.statusmessage

    def touched(self) -> int:
        """How many rows the statement touched."""
        self._work.settle()
        return self._cursor.rowcount


@dataclass(frozen=True, slots=True)
class UnitOfWork:
    """
    One transaction, and what is to follow its commit.

    Statements go to psycopg as they are, and travel together: they are sent once an answer is read, or to commit. Each
    still sees what those before it did and waited for, as if they had been sent one by one.
    """

    connection: Session
    pipeline: psycopg.Pipeline
    _breaker: Breaker
    _unsent: list[tuple[psycopg.Cursor[Any], str, Any]] = field(default_factory=list)
    _after: list[Callable[[], object]] = field(default_factory=list)

    def after_commit(self, action: Callable[[], object]) -> None:
        """Run `action` once the transaction has committed; never if it rolls back."""
        self._after.append(action)

    def ask(self, statement: TextClause, parameters: Parameters | Sequence[Parameters] | None = None) -> QueryResult:
        """
        A statement, once for each of a list of parameters. A failure is raised with the next answer that is waited for,
        at the latest by the commit.
        """
        return self._ask(statement, parameters, namedtuple_row)

    def _ask(
        self,
        statement: TextClause,
        parameters: Parameters | Sequence[Parameters] | None,
        row_factory: RowFactory[Any],
    ) -> QueryResult:
        cursor = self.connection.cursor(row_factory=row_factory)
        self._unsent.append((cursor, _sql(statement), {} if parameters is None else parameters))
        return QueryResult(self, cursor)

    def rows(self, statement: TextClause, parameters: Parameters | None = None) -> list[Any]:
        """All rows of a statement."""
        return self.ask(statement, parameters).fetchall()

    def row(self, statement: TextClause, parameters: Parameters | None = None) -> Any | None:
        """The first row of a statement, or None."""
        return self.ask(statement, parameters).fetchone()

    def ask_of(self, type_: type[Any], statement: TextClause, parameters: Parameters | None = None) -> QueryResult:
        """As `ask`, with the rows as objects of a class whose fields have the names of the columns."""
        return self._ask(statement, parameters, class_row(type_))

    def rows_of(self, type_: type[T], statement: TextClause, parameters: Parameters | None = None) -> list[T]:
        """All rows of a statement, as objects of a class whose fields have the names of the columns."""
        found: list[T] = self._ask(statement, parameters, class_row(type_)).fetchall()
        return found

    def row_of(self, type_: type[T], statement: TextClause, parameters: Parameters | None = None) -> T | None:
        """The first row of a statement, as an object of such a class, or None."""
        found: T | None = self._ask(statement, parameters, class_row(type_)).fetchone()
        return found

    def run(self, statement: TextClause, parameters: Parameters | Sequence[Parameters] | None = None) -> int:
        """Execute a statement; gives the number of rows that it touched."""
        return self.ask(statement, parameters).touched()

    def settle(self) -> None:
        """
        Send what was asked, and wait for all answers.

        It ends with a sync. Until that is seen, the server expects more to come at once, and does not measure how long
        the client is silent; so nothing is sent without one (app/decisions.md, 31).
        """
        if self._unsent:
            self.send()
            self.pipeline.sync()
            self._breaker.answered()

    def send(self) -> None:
        """Send what was asked. Whoever does, syncs next."""
        unsent = self._unsent.copy()
        self._unsent.clear()
        self.connection.send(unsent)


class Database:
    """A pool of connections to Postgres."""

    def __init__(self, url: str, *, pool_size: int = 8, answer_timeout: timedelta | None = None) -> None:
        """
        Connects to nothing. Up to twice `pool_size` transactions can go on at once.

        With an `answer_timeout`, an answer, a free connection or a lock is waited for so long; without it, as long
        as it takes, half a minute, and half a minute.
        """
        self.url = url
        self._timeout = None if answer_timeout is None else answer_timeout.total_seconds()
        self._breaker = Breaker(_PROBE_EVERY)
        locks = {} if self._timeout is None else {"lock_timeout": f"{self._timeout * _LOCKS * 1000:.0f}"}
        # Who wants a transaction says so: `work` sends BEGIN, `schema` asks SQLAlchemy.
        self.engine: Engine = create_engine(
            make_url(url).set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=False,
            pool_timeout=30 if self._timeout is None else self._timeout,
            isolation_level="AUTOCOMMIT",
            connect_args={
                "connect_timeout": _CONNECT,
                "options": " ".join(f"-c {k}={v}" for k, v in (_SERVER | locks).items()),
            }
            | _CLIENT,
        )
        event.listen(self.engine, "do_connect", _connect)

    @contextmanager
    def work(self) -> Iterator[UnitOfWork]:
        """
        One transaction: committed at the end of the block, rolled back when the block raises.

        Raises DatabaseUnreachable when the connection cannot be had or is lost; whether a commit under way
        was carried out is then unknown, so callers guard what they write by the state that it replaces.
        """
        if not self._breaker.admits():
            raise DatabaseUnreachable("the database does not answer")
        try:
            with self._session() as connection:
                with connection.pipeline() as pipeline:
                    work = UnitOfWork(connection, pipeline, self._breaker)
                    work.ask(_BEGIN)
                    yield work
                    committed = work.ask(_COMMIT)
                    work.send()  # the end of the pipeline is a sync
                assert committed.status() == "COMMIT", "nobody goes on after a statement has failed"
        except (AnswerTimeout, psycopg.errors.ConnectionTimeout) as error:
            self._breaker.timed_out(error.seconds if isinstance(error, AnswerTimeout) else _CONNECT)
            raise DatabaseUnreachable(_reason(error)) from error
        except _UNREACHABLE as error:
            raise DatabaseUnreachable(_reason(error)) from error
        self._breaker.answered()
        for action in work._after:
            action()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """A connection of the pool, which goes back into it without a transaction."""
        pool = self.engine.pool
        pooled = pool.connect()
        connection = pooled.driver_connection
        assert isinstance(connection, Session)
        connection.answer_timeout = self._timeout
        try:
            yield connection
        except psycopg.errors.ReadOnlySqlTransaction:
            # The server is a standby now, or was one when it was called: another one may have its place.
            connection.close()
            raise
        finally:
            self._give_back(pooled, connection, pool)

    def _give_back(self, pooled: Any, connection: Session, pool: Pool) -> None:
        """A connection that is lost takes the others of its pool along: they have no server either."""
        if connection.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
            try:
                connection.execute("ROLLBACK")
            except psycopg.Error:
                connection.close()
        connection.answer_timeout = None
        if connection.closed:
            _log.warning("database_connection_lost")
            pooled.invalidate()
            if self.engine.pool is pool:
                self.engine.dispose()
        pooled.close()

    def raw_url(self) -> str:
        """The address for psycopg itself, for connections outside the pool (LISTEN)."""
        asked = {key: str(value) for key, value in _CLIENT.items()}
        url = make_url(self.url).set(drivername="postgresql").update_query_dict(asked)
        return url.render_as_string(hide_password=False)

    def upgrade(self, revision: str = "head") -> None:
        """Bring the schema to `revision`. Several processes may call this at once: they queue."""
        with self.schema() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config = _config()
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, revision)

    def revision(self) -> str | None:
        """The revision of the schema, or None where there is none yet."""
        with self.work() as work:
            there = work.row(text("SELECT to_regclass('alembic_version') AS name"))
            row = work.row(text("SELECT version_num FROM alembic_version")) if there and there.name else None
            return row and row.version_num

    @contextmanager
    def schema(self) -> Iterator[Connection]:
        """
        A transaction of SQLAlchemy, for what reads the schema or changes it.

        Raises DatabaseUnreachable.
        """
        try:
            with self.engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
                yield connection
        except (OperationalError, NoneFree) as error:
            raise DatabaseUnreachable(_reason(error)) from error

    def require_head(self) -> None:
        """Raises DatabaseBehind unless the schema is the one that this version needs."""
        current, head = self.revision(), head_revision()
        if current != head:
            raise DatabaseBehind(current, head)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def at_head(url: str, *, pool_size: int, answer_timeout: timedelta | None = None) -> Database:
    """
    The database, once it is seen to have the schema that this version needs. The arguments are Database's.

    Raises DatabaseBehind, DatabaseUnreachable.
    """
    database = Database(url, pool_size=pool_size, answer_timeout=answer_timeout)
    try:
        database.require_head()
    except BaseException:
        database.close()
        raise
    return database


@cache
def head_revision() -> str:
    """The revision that this version needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "there is at least one migration"
    return head


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(shipped.folder("alembic")).replace("%", "%%"))
    return config


@lru_cache(maxsize=512)
def _sql(statement: TextClause) -> str:
    """The statement as psycopg takes it."""
    return str(statement.compile(dialect=_DIALECT))


def _connect(_: Any, __: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> Session:
    """How SQLAlchemy makes a connection."""
    return Session.connect(*arguments, **named)


def _reason(error: Exception) -> str:
    if isinstance(error, NoneFree):
        return "the database cannot be reached: all connections are in use"
    cause = error.orig if isinstance(error, OperationalError) else error
    said = str(cause).strip().splitlines()[0]
    if isinstance(cause, psycopg.errors.LockNotAvailable):
        return f"what this needs is locked by another: {said}"
    return f"the database cannot be reached: {said}"
