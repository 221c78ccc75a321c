"""
Effects on pools and hosts: commands for the reconciler, and the state of a host.

Nothing here stops a process: the reconciler does in its next pass, and a pool finishes its steps first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import text

from app.fleet.host import HostState
from app.governance.actions.action import EvictIdleAction, QuarantineHostAction, RestartPoolAction, ScalePoolAction
from app.governance.actions.effects.effect import ActionContext, RowEffect, reason_of
from app.governance.actions.execution import ActionExecution
from app.governance.actions.outcome import ActionChange, ActionRefused
from app.kernel.database import UnitOfWork
from app.kernel.settings import Settings
from app.kernel.units import durations, sizes
from app.scheduler import operator_commands

_SERVING = """
    FROM pool JOIN reservation ON reservation.id = pool.id JOIN pool_report ON pool_report.pool_id = pool.id
    WHERE reservation.state = 'active' AND pool.desired = 'run' AND phase = 'serving'
      AND NOT EXISTS (SELECT FROM pool_command WHERE pool_id = pool.id AND done_at IS NULL)
"""
_IDLE = text(f"""
    SELECT pool.id::text AS id, pool.model, reservation.host,
           extract(epoch FROM now() - COALESCE(last_used_at, serving_at, pool.created_at))::float AS idle,
           (SELECT COALESCE(sum(bytes), 0)::bigint FROM reservation_device WHERE reservation_id = pool.id) AS bytes
    {_SERVING} AND busy = 0 AND NOT pinned
      AND (CAST(:model AS text) IS NULL OR pool.model = :model)
      AND (CAST(:host AS text) IS NULL OR reservation.host = :host)
      AND COALESCE(last_used_at, serving_at, pool.created_at) < now() - CAST(:idle AS interval)
      AND NOT EXISTS (SELECT FROM step WHERE step.model = pool.model AND step.state = 'ready')
    ORDER BY idle DESC LIMIT :limit
""")
_COUNT_POOLS = text("""
    SELECT pool.model, count(*) AS pools FROM pool JOIN reservation ON reservation.id = pool.id
    WHERE reservation.state <> 'released' AND desired = 'run' GROUP BY pool.model
""")
_POOL = text(f"""
    SELECT pool.id::text AS id, pool.model {_SERVING}
      AND (pool.id::text = :pool OR pool.id::text LIKE '%' || :suffix OR worker = :pool)
    ORDER BY pool.id LIMIT 2
""")
_POOLS = text(
    f"SELECT pool.id::text AS id, pool.model {_SERVING} AND pool.model = :model ORDER BY pool.id LIMIT :limit"
)
_TARGET = text("SELECT pools, pinned FROM pool_target WHERE model = :model FOR UPDATE")
_PUT_TARGET = text("""
    INSERT INTO pool_target (model, pools, pinned) VALUES (:model, :pools, false)
    ON CONFLICT (model) DO UPDATE SET pools = :pools
""")
_DELETE_TARGET = text("DELETE FROM pool_target WHERE model = :model AND NOT pinned")
_HOSTS = text("SELECT name, state, lost_at IS NULL AND agent_until > now() AS alive FROM host ORDER BY name FOR UPDATE")
_SET_STATE = text("UPDATE host SET state = :state WHERE name = :host")
#: Longest suffix of an id that names a pool, as in commands.
_SUFFIX = 36
#: Fewest characters of such a suffix.
_SHORTEST = 4


def evict(
    context: ActionContext, work: UnitOfWork, action: EvictIdleAction, execution: ActionExecution
) -> ActionChange:
    """Stop idle pools, the longest unused first."""
    found = idle_pools(context, work, action.model, action.host, action.idle_for, action.max_pools)
    if not found:
        where = f" of {action.model}" if action.model else ""
        raise ActionRefused(f"no pool{where} is idle for {durations.show(action.idle_for)} and may be stopped")
    return stopping(context, work, found, execution)


def idle_pools(
    context: ActionContext,
    work: UnitOfWork,
    model: str | None,
    host: str | None,
    idle_for: timedelta,
    limit: int,
    *,
    kept: bool = False,
) -> list[Any]:
    """
    Return pools that may be stopped. Those that the catalogue or an operator wants to run are among them only with
    `kept`: then another one is started.
    """
    values = {"model": model, "host": host, "idle": idle_for, "limit": 200}
    running = {row.model: row.pools for row in work.rows(_COUNT_POOLS)}
    wanted = {row.model: row.pools for row in work.rows(text("SELECT model, pools FROM pool_target"))}
    catalog = context.catalog()
    settings = context.settings()
    listed = {one.name for name in _loaded(settings) if (one := catalog.resolve(name)) is not None}
    found: list[Any] = []
    for row in work.rows(_IDLE, values):
        entry = catalog.find(row.model)
        least = max(wanted.get(row.model, 0), entry.pools.min if entry is not None else 0, int(row.model in listed))
        if kept:
            found.append(row)
        elif running.get(row.model, 0) > least and len(found) < limit:
            running[row.model] -= 1
            found.append(row)
    return found


def _loaded(settings: Settings) -> tuple[str, ...]:
    """The models of which a pool runs whether it is used or not."""
    return (*settings.pools.models, *settings.serving.resident)


def stopping(
    context: ActionContext, work: UnitOfWork, pools: Sequence[Any], execution: ActionExecution
) -> ActionChange:
    """Command pools to stop."""
    for pool in pools:
        operator_commands.insert_command(work, "stop", pool.model, pool.id, reason_of(execution))
    work.after_commit(context.wake)
    before = [{"pool": one.id, "model": one.model, "host": one.host, "bytes": one.bytes} for one in pools]
    names = ", ".join(sorted({one.model for one in pools}))
    freed = sizes.show(sum(one.bytes for one in pools))
    return ActionChange(f"{len(pools)} idle pools of {names} stop, which frees {freed}", before, [])


def restart(
    context: ActionContext, work: UnitOfWork, action: RestartPoolAction, execution: ActionExecution
) -> ActionChange:
    """Drain pools and start others in their place."""
    found = _pools_to_restart(work, action)
    for pool in found:
        operator_commands.insert_command(work, "stop", pool.model, pool.id, reason_of(execution))
        operator_commands.insert_command(work, "start", pool.model, None, reason_of(execution))
    work.after_commit(context.wake)
    return ActionChange(f"{len(found)} pools of {found[0].model} restart", [pool.id for pool in found], [])


def _restart_target(_: ActionContext, work: UnitOfWork, action: RestartPoolAction, __: ActionExecution) -> str:
    """The model: each restart makes a pool with another id, and they are counted together."""
    return f"model {_pools_to_restart(work, action)[0].model}"


def _pools_to_restart(work: UnitOfWork, action: RestartPoolAction) -> list[Any]:
    if action.pool is None:
        found = work.rows(_POOLS, {"model": action.model, "limit": action.max_pools})
        if not found:
            raise ActionRefused(f"no pool of {action.model} serves")
        return found
    suffix = action.pool if _SHORTEST <= len(action.pool) <= _SUFFIX else "no pool"
    found = work.rows(_POOL, {"pool": action.pool, "suffix": suffix.replace("%", "").replace("_", "")})
    if len(found) != 1:
        raise ActionRefused(
            f"no pool {action.pool!r} serves" if not found else f"several pools end with {action.pool!r}"
        )
    return found


def scale(context: ActionContext, work: UnitOfWork, action: ScalePoolAction, _: ActionExecution) -> ActionChange:
    """Keep at least so many pools of a model running."""
    model = _model(context, action)
    row = work.row(_TARGET, {"model": model})
    before = 0 if row is None else row.pools
    if before > action.pools:
        raise ActionRefused(f"an operator keeps {before} pools of {model} running, which is more")
    work.execute(_PUT_TARGET, {"model": model, "pools": action.pools})
    work.after_commit(context.wake)
    return ActionChange(f"at least {action.pools} pools of {model} run", before, action.pools, holds=True)


def unscale(context: ActionContext, work: UnitOfWork, _: ScalePoolAction, execution: ActionExecution) -> str:
    """Restore the number of pools that are kept running."""
    model = execution.target.removeprefix("model ")
    row = work.row(_TARGET, {"model": model})
    now = 0 if row is None else row.pools
    if now != execution.after:
        raise ActionRefused(f"{now} pools of {model} are kept running since: it is left as it is")
    if execution.before:
        work.execute(_PUT_TARGET, {"model": model, "pools": execution.before})
    else:
        work.execute(_DELETE_TARGET, {"model": model})
    work.after_commit(context.wake)
    return f"{execution.before} pools of {model} are kept running"


def _model(context: ActionContext, action: ScalePoolAction) -> str:
    found = context.catalog().resolve(action.model or "")
    if found is None:
        raise ActionRefused(f"the catalogue has no model {action.model!r}")
    return found.name


def _scale_target(context: ActionContext, _: UnitOfWork, action: ScalePoolAction, __: ActionExecution) -> str:
    return f"model {_model(context, action)}"


def quarantine(
    context: ActionContext, work: UnitOfWork, action: QuarantineHostAction, _: ActionExecution
) -> ActionChange:
    """Place no further pools on a host."""
    hosts = {row.name: row for row in work.rows(_HOSTS)}
    host = hosts.get(action.host or "")
    if host is None:
        raise ActionRefused(f"there is no host {action.host!r}; there are: {', '.join(hosts) or 'none'}"[:500])
    if host.state != HostState.SCHEDULABLE:
        if host.state == HostState.CORDONED:
            return ActionChange(f"{host.name} was cordoned", host.state, host.state, holds=True)
        raise ActionRefused(f"{host.name} is {host.state}")
    others = [one for one in hosts.values() if one.state == HostState.SCHEDULABLE and one.alive and one is not host]
    if not others:
        raise ActionRefused(f"{host.name} is the last host on which pools can be placed")
    out = sum(one.state != HostState.SCHEDULABLE for one in hosts.values())
    most = max(1, math.floor(context.settings().actions.max_quarantined * len(hosts)))
    if out + 1 > most:
        raise ActionRefused(f"{out} of {len(hosts)} hosts take no pools already (actions.max_quarantined)")
    work.execute(_SET_STATE, {"host": host.name, "state": HostState.CORDONED.value})
    work.after_commit(context.wake)
    return ActionChange(f"no further pools are placed on {host.name}", host.state, HostState.CORDONED.value, holds=True)


def unquarantine(context: ActionContext, work: UnitOfWork, _: QuarantineHostAction, execution: ActionExecution) -> str:
    """Restore the state of a host, unless somebody else has changed it since."""
    name = execution.target.removeprefix("host ")
    host = next((row for row in work.rows(_HOSTS) if row.name == name), None)
    if host is None or host.state != execution.after:
        raise ActionRefused(f"{name} is {'gone' if host is None else host.state} since: it is left as it is")
    work.execute(_SET_STATE, {"host": name, "state": execution.before})
    work.after_commit(context.wake)
    return f"{name} is {execution.before}"


EVICT = RowEffect(evict)
RESTART = RowEffect(restart, target=_restart_target)
SCALE = RowEffect(scale, unscale, _scale_target)
QUARANTINE = RowEffect(quarantine, unquarantine)
