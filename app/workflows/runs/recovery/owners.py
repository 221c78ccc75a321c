"""
Owners: the worker processes that hold claimed steps, and the expiry of the leases of a dead one.

An owner is written `NAME@HOST/PID/INCARNATION`. The parent of a worker process chooses its unique incarnation:
a pool's is its id. So a parent that sees its child dead knows which steps the child held.

Only leases are expired here. The sweep then takes the steps from their holder as with every expired lease, under the
lock of the run and guarded by the attempt: a result that was recorded meanwhile stays, and nothing is done twice.
Nothing here decides whether a process is dead: the caller has seen its end.
"""

from __future__ import annotations

from sqlalchemy import text

from app.kernel.database import Database

#: The most characters of an owner, as the columns of steps and attempts.
MAX_LENGTH = 200

# A locked row is being changed by another transaction; if the step is still held after that, its lease expires later.
_EXPIRE = text("""
    UPDATE step SET lease_until = now() - interval '1 microsecond' WHERE id IN (
        SELECT id FROM step
        WHERE state IN ('running', 'cancelling') AND lease_until >= now()
          AND split_part(owner, '/', -1) = :incarnation
        FOR UPDATE SKIP LOCKED
    )
""")


def owner_of(worker: str, host: str, pid: int, incarnation: str) -> str:
    """The owner of that incarnation; a long worker name is cut."""
    end = f"/{pid}/{incarnation}"
    return f"{worker}@{host}"[: MAX_LENGTH - len(end)] + end


def expire_leases(database: Database, incarnation: str) -> int:
    """
    Expire the leases of the steps that a dead process held; returns their number. Raises DatabaseUnreachable.

    The caller has seen the process dead: a live one would continue steps that other workers claim.
    """
    with database.work() as work:
        return work.run(_EXPIRE, {"incarnation": incarnation})
