"""The effect on memory: defragment now, and stop idle pools that leak, and others until enough is free."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import text

from app.governance.actions.action import CleanUpMemoryAction
from app.governance.actions.effects import pools
from app.governance.actions.effects.effect import ActionContext, OutsideEffect
from app.governance.actions.execution import ActionExecution
from app.governance.actions.outcome import ActionChange, ActionRefused
from app.kernel.database import UnitOfWork

_USED = text("""
    SELECT sum(charged_bytes)::float AS used, sum(capacity_bytes)::float AS capacity FROM device
    WHERE present AND (CAST(:host AS text) IS NULL OR host = :host)
""")


#: A pool that uses more than it has reserved by this factor leaks: the measurement itself is rounded.
_LEAKS = 1.05
_LEAKING = text("""
    SELECT pool_id::text AS id FROM pool_process
    WHERE pool_id = ANY(CAST(:ids AS uuid[]))
      AND (SELECT sum(value::text::bigint) FROM jsonb_each(used))
          > :factor * (SELECT sum(bytes) FROM reservation_device WHERE reservation_id = pool_id)
""")


def _clean_up(context: ActionContext, action: CleanUpMemoryAction, execution: ActionExecution) -> ActionChange:
    with context.database.work() as work:
        before = _utilisation(work, action.host)
    moved = context.defragment()
    stopped: list[dict[str, Any]] = []
    with context.database.work() as work:
        used, capacity = _utilisation(work, action.host)
        chosen = _leaking(context, work, action)
        used -= sum(pool.bytes for pool in chosen)
        if action.until is not None:
            for pool in pools.idle_pools(context, work, None, action.host, timedelta(0), action.max_pools):
                more = pool not in chosen and len(chosen) < action.max_pools
                if more and capacity and used / capacity > action.until:
                    used -= pool.bytes
                    chosen.append(pool)
        if chosen:
            stopped = pools.stopping(context, work, chosen, execution).before
    if not moved.moves and not stopped:
        why = "; ".join(f"{one.model}: {one.reason}" for one in moved.stuck) or "nothing can be moved or stopped"
        raise ActionRefused(f"no memory was freed: {why}")
    moves = [{"pool": one.pool, "reason": one.reason} for one in moved.moves]
    detail = f"{len(moves)} idle pools move, {len(stopped)} stop"
    was = {"reserved": _part(*before)}
    return ActionChange(detail, was, {"reserved": _part(used, capacity), "moves": moves, "stopped": stopped})


def _leaking(context: ActionContext, work: UnitOfWork, action: CleanUpMemoryAction) -> list[Any]:
    """Idle pools that use more than they have reserved, also those that should run: others are started for them."""
    idle = pools.idle_pools(context, work, None, action.host, timedelta(0), action.max_pools, kept=True)
    ids = [pool.id for pool in idle]
    leaking = {row.id for row in work.rows(_LEAKING, {"ids": ids, "factor": _LEAKS})} if ids else set()
    return [pool for pool in idle if pool.id in leaking][: action.max_pools]


def _utilisation(work: UnitOfWork, host: str | None) -> tuple[float, float]:
    row = work.rows(_USED, {"host": host})[0]
    return row.used or 0.0, row.capacity or 0.0


def _part(used: float, capacity: float) -> float:
    return round(used / capacity, 4) if capacity else 0.0


CLEAN_UP = OutsideEffect(_clean_up)
