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

from app.kernel.database import Work


def remove(work: Work, table: str, after: str, limit: int) -> tuple[int, str | None]:
    """
    Remove rows of a table that nothing refers to, at most so many, with hashes beyond `after`.

    Gives how many were removed, and the last hash that was looked at; None when there are no more.
    """
    lock, delete = _statements(table)
    found = [row.sha256 for row in work.rows(lock, {"after": after, "limit": limit})]
    removed = work.run(delete, {"refs": found}) if found else 0
    return removed, found[-1] if len(found) == limit else None


@cache
def _statements(table: str) -> tuple[Any, Any]:
    """To lock some, and to remove those that are still not used."""
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
    lock = f"""
        SELECT sha256 FROM {table} WHERE sha256 > :after AND {unused}
        ORDER BY sha256 LIMIT :limit FOR UPDATE OF {table} SKIP LOCKED
    """
    return text(lock), text(f"DELETE FROM {table} WHERE sha256 = ANY(:refs) AND {unused}")
