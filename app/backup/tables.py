"""
The tables of an installation, as the database itself describes them.

They are those of the current schema, without what extensions own and without the record of migrations: the revision is
in the manifest. All names come from the catalogue of the database, and are quoted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from psycopg import sql

from app.backup.manifest import SequenceValue

#: The table in which migrations are recorded.
REVISION_TABLE = "alembic_version"

_TABLES = """
    SELECT relname, array_agg(attname::text ORDER BY attnum)
    FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
      AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
      AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype = 'e')
    GROUP BY relname ORDER BY relname
"""
_SEQUENCES = """
    SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind = 'S'
      AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype = 'e')
    ORDER BY relname
"""
_FOREIGN_KEYS = """
    SELECT conrelid::regclass::text, quote_ident(conname), pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = current_schema()::regnamespace AND contype = 'f' AND conparentid = 0 ORDER BY conname
"""
_INDEXES = """
    SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid)
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE relnamespace = current_schema()::regnamespace
      AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
      AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = indexrelid) ORDER BY 1
"""


def read_schema(connection: psycopg.Connection[Any]) -> dict[str, list[str]]:
    """Return the columns that are stored, by table."""
    found = connection.execute(_TABLES).fetchall()
    return {name: columns for name, columns in found if name != REVISION_TABLE}


def is_empty(connection: psycopg.Connection[Any]) -> bool:
    """Whether the schema has no table at all, not even that of migrations."""
    return connection.execute(_TABLES).fetchone() is None


def read_sequences(connection: psycopg.Connection[Any]) -> list[SequenceValue]:
    """Return the states of all sequences. Unlike rows, they are those of now, and never behind the rows."""
    found = []
    for (name,) in connection.execute(_SEQUENCES).fetchall():
        query = sql.SQL("SELECT last_value, is_called FROM {}").format(sql.Identifier(name))
        row = connection.execute(query).fetchone()
        assert row is not None, "a sequence has one row"
        found.append(SequenceValue(name=name, last_value=row[0], is_called=row[1]))
    return found


def set_sequences(connection: psycopg.Connection[Any], states: Sequence[SequenceValue]) -> list[str]:
    """Set the states of sequences. Returns the names of those that do not exist here, which are left out."""
    known = {name for (name,) in connection.execute(_SEQUENCES).fetchall()}
    for one in states:
        if one.name in known:
            values = (sql.Identifier(one.name).as_string(connection), one.last_value, one.is_called)
            connection.execute("SELECT setval(%s::regclass, %s, %s)", values)
    return [one.name for one in states if one.name not in known]


def lock_for_reading(connection: psycopg.Connection[Any], names: Sequence[str]) -> None:
    """Keep the tables from being changed in form, or truncated, until the end of the transaction."""
    tables = sql.SQL(", ").join(map(sql.Identifier, names))
    connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(tables))


def copy_out(name: str, columns: Sequence[str]) -> sql.Composed:
    """Return the statement that sends the rows of a table."""
    return sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT").format(_columns(columns), sql.Identifier(name))


def copy_in(name: str, columns: Sequence[str]) -> sql.Composed:
    """Return the statement that takes the rows of a table."""
    return sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(name), _columns(columns))


def drop_checks(connection: psycopg.Connection[Any], schema: Mapping[str, Sequence[str]]) -> list[str]:
    """
    Empty the tables, and drop foreign keys and indexes: rows are then written in any order, and faster.

    Returns the statements that make them again, with which Postgres checks the rows.
    """
    tables = sql.SQL(", ").join(map(sql.Identifier, schema))
    connection.execute(sql.SQL("TRUNCATE {}").format(tables))
    again = []
    # What follows was written by the database about the schema that our migrations have just made.
    for index, definition in connection.execute(_INDEXES).fetchall():
        connection.execute(f"DROP INDEX {index}".encode())
        again.append(definition)
    for table, constraint, definition in connection.execute(_FOREIGN_KEYS).fetchall():
        connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT {constraint}".encode())
        again.append(f"ALTER TABLE {table} ADD CONSTRAINT {constraint} {definition}")
    return again


def _columns(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))
