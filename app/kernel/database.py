"""
The database: the engine, the unit of work, and whether the schema is the one that this version needs.

One service call is one transaction. What must follow a commit (a message to the broker) waits for it;
what follows and fails is logged and left to the sweep.
Timestamps, leases and delays are judged by the database's clock alone: hosts' clocks differ, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import alembic.command
import psycopg
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.pq import TransactionStatus
from psycopg.rows import namedtuple_row
from sqlalchemy import Connection, Engine, TextClause, create_engine, text
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import Pool
from sqlmodel import SQLModel

from app.kernel import log, shipped
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
    "timezone": "UTC",
}

Parameters = Mapping[str, Any]
#: What turns a statement's `:name` into what psycopg reads.
_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call] # unknown to the stubs


@dataclass(frozen=True, slots=True)
class Work:
    """
    One transaction, and what is to follow its commit.

    Statements go to psycopg as they are, and travel together: only answers that are read are waited for, and the
    commit. Each still sees what those before it did and waited for, as if they had been sent one by one.
    """

    connection: psycopg.Connection[Any]
    pipeline: psycopg.Pipeline
    _after: list[Callable[[], object]] = field(default_factory=list)

    def after_commit(self, action: Callable[[], object]) -> None:
        """Run `action` once the transaction has committed; never if it rolls back."""
        self._after.append(action)

    def ask(self, statement: TextClause, parameters: Parameters | Sequence[Parameters] | None = None) -> Any:
        """
        Send a statement, once for each of a list of parameters. Its rows wait in the cursor; a failure is raised with
        the next answer that is waited for, at the latest by the commit.
        """
        cursor = self.connection.cursor(row_factory=namedtuple_row)
        if isinstance(parameters, list):
            cursor.executemany(_sql(statement), parameters)
            return cursor
        return cursor.execute(_sql(statement), parameters or {})

    def rows(self, statement: TextClause, parameters: Parameters | None = None) -> list[Any]:
        """All rows of a statement."""
        found: list[Any] = self.ask(statement, parameters).fetchall()
        return found

    def row(self, statement: TextClause, parameters: Parameters | None = None) -> Any | None:
        """The first row of a statement, or None."""
        return self.ask(statement, parameters).fetchone()

    def run(self, statement: TextClause, parameters: Parameters | Sequence[Parameters] | None = None) -> int:
        """Execute a statement; gives the number of rows that it touched."""
        cursor = self.ask(statement, parameters)
        self.pipeline.sync()
        touched: int = cursor.rowcount
        return touched


class Database:
    """A pool of connections to Postgres."""

    def __init__(self, url: str, *, pool_size: int = 8) -> None:
        self.url = url
        # Who wants a transaction says so: `work` sends BEGIN, `schema` asks SQLAlchemy.
        self.engine: Engine = create_engine(
            make_url(url).set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=False,
            pool_timeout=30,
            isolation_level="AUTOCOMMIT",
            connect_args={"connect_timeout": 5, "options": " ".join(f"-c {k}={v}" for k, v in _SERVER.items())}
            | _CLIENT,
        )

    @contextmanager
    def work(self) -> Iterator[Work]:
        """
        One transaction: committed at the end of the block, rolled back when the block raises.

        Raises DatabaseUnreachable when the connection cannot be had or is lost; whether a commit under way
        was carried out is then unknown, so callers guard what they write by the state that it replaces.
        """
        pool = self.engine.pool
        try:
            pooled = pool.connect()
        except (psycopg.OperationalError, OperationalError) as error:
            raise DatabaseUnreachable(_reason(error)) from error
        connection = pooled.driver_connection
        assert isinstance(connection, psycopg.Connection)
        try:
            with connection.pipeline() as pipeline:
                connection.execute("BEGIN")
                work = Work(connection, pipeline)
                yield work
                connection.execute("COMMIT")
        except psycopg.errors.ReadOnlySqlTransaction as error:
            # A fail-over: this server is a stand-by now. The next connection may find the one that took over.
            connection.close()
            raise DatabaseUnreachable(_reason(error)) from error
        except (psycopg.OperationalError, psycopg.errors.IdleInTransactionSessionTimeout) as error:
            raise DatabaseUnreachable(_reason(error)) from error
        finally:
            self._give_back(pooled, connection, pool)
        for action in work._after:
            action()

    def _give_back(self, pooled: Any, connection: psycopg.Connection[Any], pool: Pool) -> None:
        """Into the pool, without a transaction. One that is lost takes the others along: they have no server either."""
        if connection.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
            try:
                connection.execute("ROLLBACK")
            except psycopg.Error:
                connection.close()
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
        with self.schema() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    @contextmanager
    def schema(self) -> Iterator[Connection]:
        """
        A transaction of SQLAlchemy, for what reads the schema or changes it.

        Raises DatabaseUnreachable.
        """
        try:
            with self.engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
                yield connection
        except OperationalError as error:
            raise DatabaseUnreachable(_reason(error)) from error

    def require_head(self) -> None:
        """Raises DatabaseBehind unless the schema is the one that this version needs."""
        current, head = self.revision(), head_revision()
        if current != head:
            raise DatabaseBehind(current, head)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def at_head(url: str, *, pool_size: int) -> Database:
    """
    The database, once it is seen to have the schema that this version needs.

    Raises DatabaseBehind, DatabaseUnreachable.
    """
    database = Database(url, pool_size=pool_size)
    try:
        database.require_head()
    except BaseException:
        database.close()
        raise
    return database


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


def _reason(error: OperationalError | psycopg.Error) -> str:
    cause = error.orig if isinstance(error, OperationalError) else error
    return f"the database cannot be reached: {str(cause).strip().splitlines()[0]}"
