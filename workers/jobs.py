"""
The scheduled jobs of control workers, which beat triggers.

One process never runs a job twice at the same time (`workers/governance/passes.py`): if one takes longer than its
interval, the other threads stay free for steps. They do not wait for rows that others have locked.
Plans are made by one process at a time, which holds an advisory lock. No bad row stops a job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from uuid import UUID

from app.access.audit import log as audit_log
from app.files import storage
from app.inference import demand
from app.inference.batches import store as batch_store
from app.inference.model_metrics import store as model_metrics
from app.kernel import clock, ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable
from app.kernel.settings import Settings
from app.scheduler import reconcile
from app.scheduler.observation import FleetDemand
from app.scheduler.planner.defragmentation import Defragmentation
from app.scheduler.reconcile_pass import ReconcileTimes
from app.workflows import retention
from app.workflows.runs.recovery import overdue
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.schedules import store
from app.workflows.schedules.service import Schedules
from workers.passes import in_turn, time_limit
from workers.runtime import Runtime

_log = log.get(__name__)

#: Most seconds per kind of expired data in one pass: a worker that stops waits for the pass.
_EXPIRE_SECONDS = 5.0
#: What a job may have to act on within that time counts as activity. It is longer than the longest pause of beat.
_NEAR = timedelta(seconds=15)
#: Entries of the audit log that one transaction removes.
_AUDIT_BATCH = 1_000
#: Most seconds for overdue steps in one sweep.
_SWEEP_SECONDS = 5.0


def run_sweep(runtime: Runtime) -> Mapping[str, object] | None:
    """Recover lost work: see `app.workflows.runs.recovery.sweep`."""
    with in_turn():
        swept = sweep(
            runtime.runs,
            republish_after=runtime.settings.runs.republish_after,
            cursor=runtime.sweep_cursor,
            in_time=time_limit(_SWEEP_SECONDS),
        )
        done = {name: count for name, count in asdict(swept).items() if count}
        if done:
            _log.info("sweep_done", **asdict(swept))
        note_if(runtime, overdue.is_near)
    return done


def run_expire(runtime: Runtime) -> Mapping[str, object] | None:
    """Remove runs, files and audit entries whose retention is over, and definitions and payloads without references."""
    database = runtime.runs.database
    removed = {
        "runs": retention.remove_runs(database, time_limit(_EXPIRE_SECONDS)),
        "definitions": retention.remove_definitions(database, time_limit(_EXPIRE_SECONDS), ids.chance()),
        "payloads": retention.remove_payloads(database, time_limit(_EXPIRE_SECONDS), ids.chance()),
        "audit_entries": _remove_audit_entries(runtime, time_limit(_EXPIRE_SECONDS)),
        "files": storage.remove_expired(database, time_limit(_EXPIRE_SECONDS), _read_files(database)),
        "model_metrics": model_metrics.keep_short(database, clock.now(), time_limit(_EXPIRE_SECONDS)),
    }
    if any(removed.values()):
        _log.info("expired_data_removed", **removed)
    return {name: count for name, count in removed.items() if count}


def _remove_audit_entries(runtime: Runtime, in_time: Callable[[], bool]) -> int:
    """Remove entries of the audit log whose retention is over. Returns their number."""
    removed = 0
    while in_time():
        with runtime.runs.database.work() as work:
            found = audit_log.remove(work, runtime.settings.audit.retention, _AUDIT_BATCH)
        removed += found
        if found < _AUDIT_BATCH:
            break
    return removed


def _read_files(database: Database) -> set[UUID]:
    """The files that batches still read."""
    with database.work() as work:
        return batch_store.used_files(work)


def note_if(runtime: Runtime, is_near: Callable[[UnitOfWork, timedelta], bool]) -> None:
    """Note activity when a job may have something to do soon, so that beat triggers it at its full rate."""
    with suppress(DatabaseUnreachable), runtime.runs.database.work() as work:
        if is_near(work, _NEAR):
            runtime.activity.note()


def run_schedules(runtime: Runtime) -> Mapping[str, object] | None:
    """Fire the due schedules. A schedule that fails does not stop the others."""
    with in_turn():
        started = Schedules(runtime.runs, runtime.settings.schedules.keep_fires).advance_all()
        note_if(runtime, store.is_near)
    return {"started_runs": started} if started else None


def run_reconcile(runtime: Runtime) -> Mapping[str, object] | None:
    """Run a reconcile pass: adapt the desired pools of the fleet to the demand."""
    database, settings = runtime.runs.database, runtime.settings
    with in_turn():
        done = reconcile.reconcile(database, _demand_reader(runtime), _times(settings), runtime.agents.send)
    if done is None or done.quiet:
        return None
    runtime.activity.note()
    kinds = Counter(type(action).__name__ for action in done.plan.actions)
    found: dict[str, object] = {**kinds, "refusals": len(done.plan.refusals), "lost_hosts": len(done.lost)}
    return {name: count for name, count in found.items() if count}


def run_defragment(runtime: Runtime) -> Mapping[str, object] | None:
    """Move idle pools, so that models fit that now fit on no device."""
    found = defragment(runtime)
    if not found.moves:
        return None
    _log.info("defragmented", moves=len(found.moves), gains=[gain.model for gain in found.gains])
    return {"moves": len(found.moves), "gains": [gain.model for gain in found.gains]}


def defragment(runtime: Runtime) -> Defragmentation:
    """Move idle pools now, and return what was moved. Raises DatabaseUnreachable."""
    times = _times(runtime.settings)
    return reconcile.defragment(runtime.runs.database, _demand_reader(runtime), times, runtime.agents.send)


def _demand_reader(runtime: Runtime) -> Callable[[UnitOfWork], FleetDemand]:
    def read(work: UnitOfWork) -> FleetDemand:
        found = demand.read(work, runtime.catalog, (*runtime.settings.pools.models, *runtime.settings.serving.resident))
        if runtime.residencies is None:
            return found
        return replace(found, residencies=runtime.residencies.current(runtime.catalog.names))

    return read


def _times(settings: Settings) -> ReconcileTimes:
    return ReconcileTimes(settings.fleet.begin_within, settings.pools.drain_timeout, settings.fleet.host_lost_after)
