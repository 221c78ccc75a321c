"""
Owners: the processes that hold claimed steps, and what follows when one of them is seen dead.

An owner is written `NAME@HOST/PID/INCARNATION`. Whoever starts a worker process chooses its incarnation, which no other
process ever has: a pool's is its id. So the parent that sees its child dead can say which steps were in its hands.

Only leases are ended here. The sweep takes the steps from their holder as it does with every expired lease, under the
lock of the run and guarded by the attempt: what was recorded meanwhile stays, and nothing is doubled.
Nothing here judges whether a process is dead: the caller has seen its end.
"""

from __future__ import annotations

from sqlalchemy import text

from app.kernel.database import Database

#: Characters of an owner; the column of steps and attempts takes no more.
MAX_LENGTH = 200

# A row that somebody has locked is being changed right now; if it is still held after that, its lease ends by itself.
_EXPIRE = text("""
    UPDATE step SET lease_until = now() - interval '1 microsecond' WHERE id IN (
        SELECT id FROM step
        WHERE state IN ('running', 'cancelling') AND lease_until >= now()
          AND split_part(owner, '/', -1) = :incarnation
        FOR UPDATE SKIP LOCKED
    )
""")


def owner_of(worker: str, host: str, pid: int, incarnation: str) -> str:
    """The owner of that incarnation; a long name is cut."""
    end = f"/{pid}/{incarnation}"
    return f"{worker}@{host}"[: MAX_LENGTH - len(end)] + end


def expire_leases(database: Database, incarnation: str) -> int:
    """
    End the leases of the steps that a dead process held; gives their number. Raises DatabaseUnreachable.

    The caller has seen the process dead: one that lives would go on with steps that are given to others.
    """
    with database.work() as work:
        return work.run(_EXPIRE, {"incarnation": incarnation})
