"""The effect on memory: defragment now, and stop idle pools that leak, and others until enough is free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    SELECT id, charged_bytes::float AS used, capacity_bytes::float AS capacity FROM device
    WHERE present AND capacity_bytes > 0 AND (CAST(:host AS text) IS NULL OR host = :host)
""")
_HELD = text("""
    SELECT reservation_id::text AS pool, device_id AS device, bytes::float AS bytes FROM reservation_device
    WHERE reservation_id = ANY(CAST(:ids AS uuid[]))
""")
#: A pool that uses more than it has reserved by this factor leaks: the measurement itself is rounded.
_LEAKS = 1.05
#: Most idle pools among which is chosen.
_MOST_IDLE = 200
_LEAKING = text("""
    SELECT pool_id::text AS id FROM pool_process
    WHERE pool_id = ANY(CAST(:ids AS uuid[]))
      AND (SELECT sum(value::text::bigint) FROM jsonb_each(used))
          > :factor * (SELECT sum(bytes) FROM reservation_device WHERE reservation_id = pool_id)
""")


@dataclass(slots=True)
class _DeviceUse:
    """The reserved bytes of a device, and those that can be."""

    used: float
    capacity: float

    @property
    def part(self) -> float:
        return self.used / self.capacity


def _clean_up(context: ActionContext, action: CleanUpMemoryAction, execution: ActionExecution) -> ActionChange:
    with context.database.work() as work:
        before = _fullest(_devices(work, action.host))
    moved = context.defragment()
    stopped: list[dict[str, Any]] = []
    with context.database.work() as work:
        devices = _devices(work, action.host)
        chosen = _chosen(context, work, action, devices)
        if chosen:
            stopped = pools.stopping(context, work, chosen, execution).before
    if not moved.moves and not stopped:
        why = "; ".join(f"{one.model}: {one.reason}" for one in moved.stuck) or "nothing can be moved or stopped"
        raise ActionRefused(f"no memory was freed: {why}")
    moves = [{"pool": one.pool, "reason": one.reason} for one in moved.moves]
    detail = f"{len(moves)} idle pools move, {len(stopped)} stop"
    return ActionChange(
        detail, {"reserved": before}, {"reserved": _fullest(devices), "moves": moves, "stopped": stopped}
    )


def _chosen(
    context: ActionContext, work: UnitOfWork, action: CleanUpMemoryAction, devices: dict[str, _DeviceUse]
) -> list[Any]:
    """The pools that are stopped, whose bytes are deducted: those that leak, and others on full devices."""
    chosen = _leaking(context, work, action)
    idle = []
    if action.until is not None:
        idle = pools.idle_pools(context, work, None, action.host, timedelta(0), _MOST_IDLE)
    held: dict[str, dict[str, float]] = {}
    for row in work.rows(_HELD, {"ids": [pool.id for pool in (*chosen, *idle)]}):
        held.setdefault(row.pool, {})[row.device] = row.bytes
    for pool in chosen:
        _deduct(devices, held.get(pool.id, {}))
    known = {pool.id for pool in chosen}
    for pool in idle:
        parts = held.get(pool.id, {})
        full = any(devices[id_].part > (action.until or 0) for id_ in parts if id_ in devices)
        if full and pool.id not in known and len(chosen) < action.max_pools:
            _deduct(devices, parts)
            chosen.append(pool)
    return chosen


def _deduct(devices: dict[str, _DeviceUse], parts: Mapping[str, float]) -> None:
    for id_, bytes_ in parts.items():
        if id_ in devices:
            devices[id_].used -= bytes_


def _devices(work: UnitOfWork, host: str | None) -> dict[str, _DeviceUse]:
    return {row.id: _DeviceUse(row.used, row.capacity) for row in work.rows(_USED, {"host": host})}


def _fullest(devices: Mapping[str, _DeviceUse]) -> float:
    """The reserved part of the fullest device."""
    return round(max((one.part for one in devices.values()), default=0.0), 4)


def _leaking(context: ActionContext, work: UnitOfWork, action: CleanUpMemoryAction) -> list[Any]:
    """Idle pools that use more than they have reserved, also those that should run: others are started for them."""
    idle = pools.idle_pools(context, work, None, action.host, timedelta(0), action.max_pools, kept=True)
    ids = [pool.id for pool in idle]
    leaking = {row.id for row in work.rows(_LEAKING, {"ids": ids, "factor": _LEAKS})} if ids else set()
    return [pool for pool in idle if pool.id in leaking][: action.max_pools]


CLEAN_UP = OutsideEffect(_clean_up)
