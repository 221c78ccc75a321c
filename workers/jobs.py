"""
The scheduled jobs: what a control worker does about what beat sends.

A job never runs twice at a time in one process: where one takes longer than until the next message, its other threads
stay free for steps. No job waits for rows that others have locked, and one bad row stops none of them.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from app.inference import demand
from app.kernel import ids, log
from app.kernel.database import UnitOfWork
from app.kernel.errors import DatabaseUnreachable, Unavailable
from app.kernel.settings import Settings
from app.scheduler import reconcile
from app.scheduler.reconcile import FleetDemand
from app.scheduler.reconcile_pass import ReconcileTimes
from app.workflows import retention
from app.workflows.runs.recovery.sweep import sweep
from app.workflows.schedules.service import Schedules
from workers.runtime import Runtime
from workers.timetable import EXPIRE, SCHEDULES, SWEEP

_log = log.get(__name__)

#: Seconds for each kind of what expires, in one turn: a worker that is to stop waits for them.
_EXPIRE_SECONDS = 5.0
#: Seconds for what is overdue, in one sweep.
_SWEEP_SECONDS = 5.0

#: The jobs of this process that run now.
_RUNNING: dict[str, threading.Lock] = defaultdict(threading.Lock)


def run_sweep(runtime: Runtime) -> None:
    """Bring lost work back."""
    with _alone(SWEEP) as alone:
        if not alone:
            return
        try:
            swept = sweep(
                runtime.runs,
                republish_after=runtime.settings.runs.republish_after,
                cursor=runtime.sweep_cursor,
                in_time=_in_time(_SWEEP_SECONDS),
            )
        except Unavailable as error:
            _log.warning("sweep_postponed", error=str(error))
            return
        if any(asdict(swept).values()):
            _log.info("swept", **asdict(swept))


def run_expire(runtime: Runtime) -> None:
    """Remove runs whose retention is over, then the definitions and payloads that nothing refers to any more."""
    database = runtime.runs.database
    with _alone(EXPIRE) as alone:
        if not alone:
            return
        try:
            removed = {
                "runs": retention.remove_runs(database, _in_time()),
                "definitions": retention.remove_definitions(database, _in_time(), ids.chance()),
                "payloads": retention.remove_payloads(database, _in_time(), ids.chance()),
            }
        except Unavailable as error:
            _log.warning("expire_postponed", error=str(error))
            return
        if any(removed.values()):
            _log.info("expired", **removed)


@contextmanager
def _alone(job: str) -> Iterator[bool]:
    """Whether the job does not run in this process yet; it does then until the end of the block."""
    taken = _RUNNING[job].acquire(blocking=False)
    if not taken:
        _log.debug("job_goes_on", job=job)
    try:
        yield taken
    finally:
        if taken:
            _RUNNING[job].release()


def _in_time(seconds: float = _EXPIRE_SECONDS) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() < until


def run_schedules(runtime: Runtime) -> None:
    """Fire what is due of the schedules of workflows. One that breaks does not keep the others."""
    with _alone(SCHEDULES) as alone:
        if not alone:
            return
        try:
            Schedules(runtime.runs, runtime.settings.schedules.keep_fires).advance_all()
        except Unavailable as error:
            _log.warning("schedules_postponed", error=str(error))


def run_reconcile(runtime: Runtime) -> None:
    """Bring what is desired of the fleet in line with what is asked of it."""
    database, settings = runtime.runs.database, runtime.settings
    try:
        reconcile.reconcile(database, _ask(runtime), _terms(settings))
    except DatabaseUnreachable as error:
        _log.warning("reconcile_postponed", error=str(error))


def run_defragment(runtime: Runtime) -> None:
    """Move idle pools so that models fit that fit nowhere."""
    database, settings = runtime.runs.database, runtime.settings
    try:
        found = reconcile.defragment(database, _ask(runtime), _terms(settings))
    except DatabaseUnreachable as error:
        _log.warning("defragment_postponed", error=str(error))
        return
    if found.moves:
        _log.info("defragmented", moves=len(found.moves), gains=[gain.model for gain in found.gains])


def _ask(runtime: Runtime) -> Callable[[UnitOfWork], FleetDemand]:
    return lambda work: demand.read(work, runtime.catalog, runtime.settings.pools.models)


def _terms(settings: Settings) -> ReconcileTimes:
    return ReconcileTimes(settings.fleet.begin_within, settings.pools.drain_timeout, settings.fleet.host_lost_after)
