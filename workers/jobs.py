"""The scheduled jobs: what a control worker does about what beat sends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from app.fleet import reconcile
from app.fleet.turn import Terms
from app.inference import demand
from app.kernel import ids, log
from app.kernel.errors import DatabaseUnreachable, Unavailable
from app.kernel.settings import Settings
from app.workflows import expiry
from app.workflows.schedules.service import Schedules
from app.workflows.sweep import sweep
from workers.runtime import Runtime

_log = log.get(__name__)

#: Seconds for each kind of what expires, in one turn: a worker that is to stop waits for them.
_EXPIRE_SECONDS = 5.0


def run_sweep(runtime: Runtime) -> None:
    """Bring lost work back."""
    try:
        swept = sweep(runtime.runs, republish_after=runtime.settings.runs.republish_after)
    except DatabaseUnreachable as error:
        _log.warning("sweep_postponed", error=str(error))
        return
    if any(asdict(swept).values()):
        _log.info("swept", **asdict(swept))


def run_expire(runtime: Runtime) -> None:
    """Remove runs whose retention is over, then the definitions and payloads that nothing refers to any more."""
    database = runtime.runs.database
    try:
        removed = {
            "runs": expiry.remove_runs(database, _in_time()),
            "definitions": expiry.remove_definitions(database, _in_time(), ids.chance()),
            "payloads": expiry.remove_payloads(database, _in_time(), ids.chance()),
        }
    except DatabaseUnreachable as error:
        _log.warning("expire_postponed", error=str(error))
        return
    if any(removed.values()):
        _log.info("expired", **removed)


def _in_time() -> Callable[[], bool]:
    until = time.monotonic() + _EXPIRE_SECONDS
    return lambda: time.monotonic() < until


def run_schedules(runtime: Runtime) -> None:
    """Fire what is due of the schedules of workflows. One that breaks does not keep the others."""
    schedules = Schedules(runtime.runs, runtime.settings.schedules.keep_fires)
    try:
        for schedule_id in schedules.ready():
            try:
                schedules.advance(schedule_id)
            except Unavailable:
                raise
            except Exception:  # noqa: BLE001 the outermost loop
                _log.exception("schedule_broke", schedule_id=str(schedule_id))
    except Unavailable as error:
        _log.warning("schedules_postponed", error=str(error))


def run_reconcile(runtime: Runtime) -> None:
    """Bring what is desired of the fleet in line with what is asked of it."""
    database, settings = runtime.runs.database, runtime.settings
    try:
        reconcile.reconcile(database, demand.asked(database, runtime.catalog, settings.pools.models), _terms(settings))
    except DatabaseUnreachable as error:
        _log.warning("reconcile_postponed", error=str(error))


def run_defragment(runtime: Runtime) -> None:
    """Move idle pools so that models fit that fit nowhere."""
    database, settings = runtime.runs.database, runtime.settings
    try:
        found = reconcile.defragment(
            database, demand.asked(database, runtime.catalog, settings.pools.models), _terms(settings)
        )
    except DatabaseUnreachable as error:
        _log.warning("defragment_postponed", error=str(error))
        return
    if found.moves:
        _log.info("defragmented", moves=len(found.moves), gains=[gain.model for gain in found.gains])


def _terms(settings: Settings) -> Terms:
    return Terms(settings.fleet.begin_within, settings.pools.drain_timeout, settings.fleet.host_lost_after)
