"""
Garbage collection of definitions and payloads: rows shared by their hash, deleted when no row references them.

A transaction that is about to reference such a row locks it (`FOR KEY SHARE`) until its end.
A deletion has two statements. The first locks unreferenced rows that no transaction has locked. The second sees all
references that were committed before the locks were acquired, and deletes the rows that are still unreferenced.
A transaction that stores the same content in the meantime waits for the locks and then inserts the row again.
Foreign keys make a wrong deletion impossible.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from sqlalchemy import text
from sqlmodel import SQLModel

from app.kernel.database import UnitOfWork
from app.workflows.runs.storage import rows  # noqa: F401 registers the tables whose foreign keys are read below
from app.workflows.schedules import rows as schedule_rows  # noqa: F401 as above


def remove(work: UnitOfWork, table: str, after: str, limit: int) -> tuple[int, str | None]:
    """
    Visit at most `limit` rows of a table with hashes above `after`, and delete those that no row references.

    Returns the number of deleted rows, and the last visited hash; None when there are no more rows.
    """
    select, lock, delete = _statements(table)
    seen = [row.sha256 for row in work.rows(select, {"after": after, "limit": limit})]
    found = [row.sha256 for row in work.rows(lock, {"refs": seen})] if seen else []
    removed = work.run(delete, {"refs": found}) if found else 0
    return removed, seen[-1] if len(seen) == limit else None


def remove_unreferenced(work: UnitOfWork, table: str, hashes: Collection[str]) -> int:
    """Delete those of these rows that no row references; returns how many."""
    _, lock, delete = _statements(table)
    found = [row.sha256 for row in work.rows(lock, {"refs": list(hashes)})] if hashes else []
    return work.run(delete, {"refs": found}) if found else 0


@cache
def _statements(table: str) -> tuple[Any, Any, Any]:
    """Return the statements that select a batch, lock its unreferenced rows, and delete those still unreferenced."""
    tables = SQLModel.metadata.tables
    references = [
        (key.parent.table.name, key.parent.name)
        for other in tables.values()
        for key in other.foreign_keys
        if key.column.table is tables[table]
    ]
    unreferenced = " AND ".join(
        f"NOT EXISTS (SELECT FROM {user} WHERE {user}.{column} = {table}.sha256)" for user, column in references
    )
    condition = f"FROM {table} WHERE sha256 = ANY(:refs) AND {unreferenced}"
    return (
        text(f"SELECT sha256 FROM {table} WHERE sha256 > :after ORDER BY sha256 LIMIT :limit"),
        text(f"SELECT sha256 {condition} ORDER BY sha256 FOR UPDATE OF {table} SKIP LOCKED"),
        text(f"DELETE {condition}"),
    )
