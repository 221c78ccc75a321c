"""
How much the database reads for something, and rows that are kept: for tests that a job on a timer does not grow.

The figures are Postgres's own counters of rows and index entries, so they are the same on a slow machine.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import text

from app.kernel.database import Database

_FLUSH = text("SELECT pg_stat_force_next_flush()")
_READ = text("""
    SELECT ((SELECT sum(seq_tup_read) FROM pg_stat_user_tables)
          + (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes))::bigint AS total
""")
_RUNS = text("""
    INSERT INTO run (id, workflow, sha256, state, paused, workflow_paused, priority, rank, inputs, depth, retention_s,
                     created_at, started_at, finished_at, expires_at)
    SELECT gen_random_uuid(), 'new', 'kept', 'succeeded', false, false, 'standard', 1, '{}', 0, 2592000,
           now() - interval '1 day', now() - interval '1 day', now() - interval '1 day', now() + interval '29 days'
    FROM generate_series(1, :runs)
""")
_STEPS = text("""
    INSERT INTO step (id, run_id, key, position, kind, model, model_index, queue, priority, rank, state, delegated,
                      attempt, failures, losses, tokens_in, tokens_out, created_at, ready_at, started_at, finished_at)
    SELECT gen_random_uuid(), run.id, 's' || n, n, 'generate', 'm:1', 0, 'model.m-1', 'standard', 1, 'succeeded', false,
           1, 0, 0, 1, 1, run.created_at, run.created_at, run.created_at, run.created_at + interval '1 hour'
    FROM run, generate_series(1, :each) AS n WHERE run.workflow = 'new'
""")
_ATTEMPTS = text("""
    INSERT INTO attempt (step_id, attempt, owner, model, started_at, finished_at, outcome)
    SELECT id, 1, 'w@h/1/a', model, started_at, finished_at, 'succeeded' FROM step WHERE state = 'succeeded'
    ON CONFLICT DO NOTHING
""")


def rows_read(database: Database, act: Callable[[], object]) -> int:
    """Rows and index entries that Postgres reads while `act` uses that database, whose pool has one connection."""
    before = _total(database)
    act()
    return _total(database) - before


def keep_ended(database: Database, steps: int, *, each: int = 10) -> None:
    """Runs that ended long ago and are kept, with so many steps in all, each of which asked a model for an hour."""
    with database.work() as work:
        work.run(text("INSERT INTO definition (sha256, document) VALUES ('kept', '{}') ON CONFLICT DO NOTHING"))
        work.run(_RUNS, {"runs": steps // each})
        work.run(_STEPS, {"each": each})
        work.run(_ATTEMPTS)
        work.run(text("UPDATE run SET workflow = 'kept' WHERE workflow = 'new'"))
    analyze(database)


def analyze(database: Database) -> None:
    """Let Postgres see how many rows there are, as its own cleaner does sooner or later."""
    with database.work() as work:
        work.run(text("ANALYZE"))


def _total(database: Database) -> int:
    with database.work() as work:
        work.run(_FLUSH)
    with database.work() as work:
        row = work.row(_READ)
    assert row is not None
    total: int = row.total
    return total
