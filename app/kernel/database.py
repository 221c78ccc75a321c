"""
The database: the engine, the unit of work, and whether the schema is the one that this version needs.

One service call is one transaction. What must follow a commit (a message to the broker) waits for it;
what follows and fails is logged and left to the sweep.
Timestamps, leases and delays are judged by the database's clock alone: hosts' clocks differ, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import alembic.command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
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


@dataclass(frozen=True, slots=True)
class Work:
    """One transaction, and what is to follow its commit."""

    connection: Connection
    _after: list[Callable[[], object]] = field(default_factory=list)

    def after_commit(self, action: Callable[[], object]) -> None:
        """Run `action` once the transaction has committed; never if it rolls back."""
        self._after.append(action)

    def rows(self, statement: Any, parameters: Mapping[str, Any] | None = None) -> list[Any]:
        """All rows of a statement."""
        return list(self.connection.execute(statement, parameters or {}))

    def row(self, statement: Any, parameters: Mapping[str, Any] | None = None) -> Any | None:
        """The first row of a statement, or None."""
        return self.connection.execute(statement, parameters or {}).first()

    def run(self, statement: Any, parameters: Any = None) -> int:
        """Execute a statement; gives the number of rows that it touched."""
        return self.connection.execute(statement, parameters or {}).rowcount


class Database:
    """A pool of connections to Postgres."""

    def __init__(self, url: str, *, pool_size: int = 8) -> None:
        self.url = url
        self.engine: Engine = create_engine(
            make_url(url).set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=False,
            pool_timeout=30,
            connect_args={"connect_timeout": 5, "options": "-c timezone=UTC -c lock_timeout=30s"},
        )
        event.listen(self.engine, "handle_error", _note_lost_connection)

    @contextmanager
    def work(self) -> Iterator[Work]:
        """
        One transaction: committed at the end of the block, rolled back when the block raises.

        Raises DatabaseUnreachable when the connection cannot be had or is lost; whether a commit under way
        was carried out is then unknown, so callers guard what they write by the state that it replaces.
        """
        try:
            with self.engine.begin() as connection:
                work = Work(connection)
                yield work
        except OperationalError as error:
            raise DatabaseUnreachable(_reason(error)) from error
        except DBAPIError as error:
            if error.connection_invalidated:
                raise DatabaseUnreachable(_reason(error)) from error
            raise
        for action in work._after:
            action()

    def raw_url(self) -> str:
        """The address for psycopg itself, for connections outside the pool (LISTEN)."""
        return make_url(self.url).set(drivername="postgresql").render_as_string(hide_password=False)

    def upgrade(self, revision: str = "head") -> None:
        """Bring the schema to `revision`. Several processes may call this at once: they queue."""
        with self.work() as work:
            work.run(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config = _config()
            config.attributes["connection"] = work.connection
            alembic.command.upgrade(config, revision)

    def revision(self) -> str | None:
        """The revision of the schema, or None where there is none yet."""
        with self.work() as work:
            return MigrationContext.configure(work.connection).get_current_revision()

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


def _note_lost_connection(context: Any) -> None:
    """The pool makes new connections by itself; the log says why there is a pause."""
    if context.is_disconnect:
        _log.warning("database_connection_lost")


def _reason(error: DBAPIError) -> str:
    return f"the database cannot be reached: {str(error.orig).strip().splitlines()[0]}"
