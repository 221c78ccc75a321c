"""The effect on memory: defragment now, and stop idle pools until enough is free."""

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


def _clean_up(context: ActionContext, action: CleanUpMemoryAction, execution: ActionExecution) -> ActionChange:
    with context.database.work() as work:
        before = _utilisation(work, action.host)
    moved = context.defragment()
    stopped: list[dict[str, Any]] = []
    with context.database.work() as work:
        used, capacity = _utilisation(work, action.host)
        chosen = []
        if action.until is not None:
            for pool in pools.idle_pools(context, work, None, action.host, timedelta(0), action.max_pools):
                if capacity and used / capacity > action.until:
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


def _utilisation(work: UnitOfWork, host: str | None) -> tuple[float, float]:
    row = work.rows(_USED, {"host": host})[0]
    return row.used or 0.0, row.capacity or 0.0


def _part(used: float, capacity: float) -> float:
    return round(used / capacity, 4) if capacity else 0.0


CLEAN_UP = OutsideEffect(_clean_up)
