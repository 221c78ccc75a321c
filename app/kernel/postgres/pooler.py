"""
Poolers between the programs and Postgres, such as PgBouncer: what they take away is found when a program starts.

A pooler drops the settings of a connection (`options`), and in its transaction mode statements that are prepared on one
connection of the server are missing on the next one, unless it knows them.
"""

from __future__ import annotations

from collections.abc import Mapping

import psycopg
from psycopg import sql

from app.kernel.errors import DatabaseUnreachable, UnfitPooler
from app.kernel.ids import new_id
from app.kernel.postgres.connection import Connection

#: Settings of every connection to the server. The longest time for which a process that stopped in the middle of a
#: transaction can block its rows; the lock timeout is longer, so that waiting transactions outlast it.
REQUIRED: Mapping[str, str] = {
    "idle_in_transaction_session_timeout": "20s",
    "lock_timeout": "30s",
    "timezone": "UTC",
}
#: Seconds to wait for the pooler. It lets a client wait for minutes when all its connections are in use.
_TIMEOUT = 5.0
_LOST = (psycopg.errors.InvalidSqlStatementName, psycopg.errors.DuplicatePreparedStatement)


def statements(database: str) -> list[str]:
    """Return the statements that give every connection to this database the required settings."""
    return [
        sql.SQL("ALTER DATABASE {} SET {} = {}")
        .format(sql.Identifier(database), sql.SQL(name), sql.Literal(value))
        .as_string(None)
        for name, value in REQUIRED.items()
    ]


def require_fit(url: str, options: str) -> None:
    """
    Check what a connection with these `options` (of libpq) can do.

    Without a pooler this takes one connection and one query. Raises UnfitPooler, DatabaseUnreachable.
    """
    try:
        with _connect(url, options) as first:
            pid, database, idle, lock, timezone = first.execute(
                "SELECT pg_backend_pid(), current_database(), current_setting('idle_in_transaction_session_timeout'),"
                " current_setting('lock_timeout'), current_setting('timezone')"
            ).fetchone() or (0, "", "", "", "")
            if "0" in (idle, lock) or timezone != "UTC":
                raise UnfitPooler(
                    "the server or a pooler in front of it drops the settings of connections; set them once for the "
                    f"database: {'; '.join(statements(database))}; then close the connections of the pooler"
                )
            if pid != first.info.backend_pid:
                _require_prepared(first, url, options)
    except psycopg.OperationalError as error:
        raise DatabaseUnreachable(str(error).strip()) from error


def _require_prepared(first: Connection, url: str, options: str) -> None:
    """Check that a statement prepared on one connection of the server can be executed on the next one."""
    token = str(new_id())
    statement = sql.SQL("SELECT {}").format(sql.Literal(token))
    try:
        first.execute(statement, prepare=True)
        with _connect(url, options) as second:
            # In transaction mode this takes the connection of the server on which the statement is prepared.
            second.autocommit = False
            second.execute("SELECT 1")
            kept = first.execute(statement, prepare=True).fetchone() == (token,)
    except _LOST:
        kept = False
    if not kept:
        raise UnfitPooler(
            "the pooler in front of the database loses prepared statements; in transaction mode, PgBouncer 1.21 or "
            "later with max_prepared_statements above 0 is needed; session mode works with every version"
        )


def _connect(url: str, options: str) -> Connection:
    connection = Connection.connect(url, autocommit=True, connect_timeout=int(_TIMEOUT), options=options)
    connection.answer_timeout = _TIMEOUT
    return connection
