"""The scheduled jobs: what beat sends, and what a control worker does about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from app.kernel import ids, log
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES
from app.kernel.errors import DatabaseUnreachable, Unavailable
from app.kernel.settings import Settings
from app.workflows import expiry
from app.workflows.schedules.service import Schedules
from app.workflows.sweep import sweep
from workers.runtime import Runtime

_log = log.get(__name__)

#: The name of the task of `run_sweep`.
SWEEP = "workers.jobs.run_sweep"
#: The name of the task of `run_expire`.
EXPIRE = "workers.jobs.run_expire"
#: The name of the task of `run_schedules`.
SCHEDULES = "workers.jobs.run_schedules"
#: Seconds for each kind of what expires, in one turn: a worker that is to stop waits for them.
_EXPIRE_SECONDS = 5.0


def schedule(settings: Settings) -> dict[str, Any]:
    """What beat sends, and when. A message that nobody took until three later ones were sent is dropped."""
    return {
        "sweep": _entry(SWEEP, settings.runs.sweep_every),
        "expire": _entry(EXPIRE, settings.runs.expire_every),
        "schedules": _entry(SCHEDULES, settings.schedules.check_every),
    }


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


def _entry(task: str, every: timedelta) -> dict[str, Any]:
    options = {
        "queue": CONTROL_QUEUE,
        "priority": PRIORITIES["interactive"],
        "expires": max(every.total_seconds() * 3, 5),
        "ignore_result": True,
    }
    return {"task": task, "schedule": every, "options": options}
