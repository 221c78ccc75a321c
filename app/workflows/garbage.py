"""
Unused rows: definitions and payloads are shared by their hash, and go when no row refers to them.

Whoever is about to refer to one holds it (`FOR KEY SHARE`) until the end of the transaction. Removing takes two
statements: the first locks rows that nobody holds and nothing refers to; the second, which sees what was committed
until the locks were had, removes those of them that still nothing refers to. Whoever wants to store the same meanwhile
waits for the locks, and stores it anew. Foreign keys stand behind all of this.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import text
from sqlmodel import SQLModel

from app.kernel.database import UnitOfWork
from app.workflows.runs.storage import rows  # noqa: F401 who refers to what is known once they are in the metadata
from app.workflows.schedules import rows as schedule_rows  # noqa: F401 as above


def remove(work: UnitOfWork, table: str, after: str, limit: int) -> tuple[int, str | None]:
    """
    Look at the next rows of a table, at most so many, with hashes beyond `after`; remove those that nothing refers to.

    Gives how many were removed, and the last hash that was looked at; None when there are no more.
    """
    look, lock, delete = _statements(table)
    seen = [row.sha256 for row in work.rows(look, {"after": after, "limit": limit})]
    found = [row.sha256 for row in work.rows(lock, {"refs": seen})] if seen else []
    removed = work.run(delete, {"refs": found}) if found else 0
    return removed, seen[-1] if len(seen) == limit else None


@cache
def _statements(table: str) -> tuple[Any, Any, Any]:
    """To look at some, to lock those that are not used, and to remove those that are still not."""
    tables = SQLModel.metadata.tables
    users = [
        (key.parent.table.name, key.parent.name)
        for other in tables.values()
        for key in other.foreign_keys
        if key.column.table is tables[table]
    ]
    unused = " AND ".join(
        f"NOT EXISTS (SELECT FROM {user} WHERE {user}.{column} = {table}.sha256)" for user, column in users
    )
    these = f"FROM {table} WHERE sha256 = ANY(:refs) AND {unused}"
    return (
        text(f"SELECT sha256 FROM {table} WHERE sha256 > :after ORDER BY sha256 LIMIT :limit"),
        text(f"SELECT sha256 {these} ORDER BY sha256 FOR UPDATE OF {table} SKIP LOCKED"),
        text(f"DELETE {these}"),
    )
