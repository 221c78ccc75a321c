"""
The scheduled jobs of control workers, which beat triggers.

One process never runs the sweep, the expiry or the schedules twice at the same time: if they take longer than their
interval, the other threads stay free for steps. They do not wait for rows that others have locked.
Plans are made by one process at a time, which holds an advisory lock. No bad row stops a job.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from uuid import UUID

from app.access.audit import log as audit_log
from app.files import storage
from app.governance.jobs.registry import EXPIRE, SCHEDULES, SWEEP
from app.inference import demand
from app.inference.batches import store as batch_store
from app.kernel import ids, log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import DatabaseUnreachable, Unavailable
from app.kernel.settings import Settings
from app.scheduler import reconcile
from app.scheduler.observation import FleetDemand
from app.scheduler.reconcile_pass import ReconcileTimes
from app.workflows import retention
from app.workflows.runs.recovery import overdue
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.schedules import store
from app.workflows.schedules.service import Schedules
from workers.passes import exclusive, in_turn, time_limit
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


def run_sweep(runtime: Runtime) -> None:
    """Recover lost work: see `app.workflows.runs.recovery.sweep`."""
    with in_turn(), exclusive(SWEEP) as acquired:
        if not acquired:
            return
        try:
            swept = sweep(
                runtime.runs,
                republish_after=runtime.settings.runs.republish_after,
                cursor=runtime.sweep_cursor,
                in_time=time_limit(_SWEEP_SECONDS),
            )
        except Unavailable as error:
            _log.warning("sweep_postponed", error=str(error))
            return
        if any(asdict(swept).values()):
            _log.info("sweep_done", **asdict(swept))
        _note_if(runtime, overdue.is_near)


def run_expire(runtime: Runtime) -> None:
    """Remove runs, files and audit entries whose retention is over, and definitions and payloads without references."""
    database = runtime.runs.database
    with exclusive(EXPIRE) as acquired:
        if not acquired:
            return
        try:
            removed = {
                "runs": retention.remove_runs(database, time_limit(_EXPIRE_SECONDS)),
                "definitions": retention.remove_definitions(database, time_limit(_EXPIRE_SECONDS), ids.chance()),
                "payloads": retention.remove_payloads(database, time_limit(_EXPIRE_SECONDS), ids.chance()),
                "audit_entries": _remove_audit_entries(runtime, time_limit(_EXPIRE_SECONDS)),
                "files": storage.remove_expired(database, time_limit(_EXPIRE_SECONDS), _read_files(database)),
            }
        except Unavailable as error:
            _log.warning("expire_postponed", error=str(error))
            return
        if any(removed.values()):
            _log.info("expired_data_removed", **removed)


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


def _note_if(runtime: Runtime, is_near: Callable[[UnitOfWork, timedelta], bool]) -> None:
    """Note activity when a job may have something to do soon, so that beat triggers it at its full rate."""
    with suppress(DatabaseUnreachable), runtime.runs.database.work() as work:
        if is_near(work, _NEAR):
            runtime.activity.note()


def run_schedules(runtime: Runtime) -> None:
    """Fire the due schedules. A schedule that fails does not stop the others."""
    with in_turn(), exclusive(SCHEDULES) as acquired:
        if not acquired:
            return
        try:
            Schedules(runtime.runs, runtime.settings.schedules.keep_fires).advance_all()
        except Unavailable as error:
            _log.warning("schedules_postponed", error=str(error))
            return
        _note_if(runtime, store.is_near)


def run_reconcile(runtime: Runtime) -> None:
    """Run a reconcile pass: adapt the desired pools of the fleet to the demand."""
    database, settings = runtime.runs.database, runtime.settings
    try:
        with in_turn():
            done = reconcile.reconcile(database, _demand_reader(runtime), _times(settings), runtime.agents.send)
    except DatabaseUnreachable as error:
        _log.warning("reconcile_postponed", error=str(error))
        return
    if done is not None and not done.quiet:
        runtime.activity.note()


def run_defragment(runtime: Runtime) -> None:
    """Move idle pools, so that models fit that now fit on no device."""
    database, settings = runtime.runs.database, runtime.settings
    try:
        found = reconcile.defragment(database, _demand_reader(runtime), _times(settings), runtime.agents.send)
    except DatabaseUnreachable as error:
        _log.warning("defragment_postponed", error=str(error))
        return
    if found.moves:
        _log.info("defragmented", moves=len(found.moves), gains=[gain.model for gain in found.gains])


def _demand_reader(runtime: Runtime) -> Callable[[UnitOfWork], FleetDemand]:
    def read(work: UnitOfWork) -> FleetDemand:
        found = demand.read(work, runtime.catalog, runtime.settings.pools.models)
        if runtime.residencies is None:
            return found
        return replace(found, residencies=runtime.residencies.current(runtime.catalog.names))

    return read


def _times(settings: Settings) -> ReconcileTimes:
    return ReconcileTimes(settings.fleet.begin_within, settings.pools.drain_timeout, settings.fleet.host_lost_after)
