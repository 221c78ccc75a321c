"""
The horizon: the latest instant before which no transaction can still add rows.

Rows carry the time at which their transaction began. A reader that goes on from where it was must not pass an instant
for which a transaction is still open: its rows would be older than what was read, and never be seen.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import text

from app.kernel.database import UnitOfWork

#: A transaction that is open for longer is not waited for. Its locks time out after half of this.
_LONGEST = timedelta(minutes=1)
_HORIZON = text("""
    SELECT GREATEST(LEAST(now(), min(xact_start)) - interval '1 microsecond', now() - CAST(:longest AS interval)) AS at
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
""")


def horizon(work: UnitOfWork) -> datetime:
    """Return the horizon. What is read after it, in the same transaction, is complete up to there."""
    at: datetime = work.rows(_HORIZON, {"longest": _LONGEST})[0].at
    return at
