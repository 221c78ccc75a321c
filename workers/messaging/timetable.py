"""
The timetable: the scheduled jobs by name, and when beat sends them.

It loads no more than beat needs, so that the clock ticks soon after a start.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from app.kernel.broker import CONTROL_QUEUE, PRIORITIES
from app.kernel.settings import Settings
from app.scheduler.tasks import DEFRAGMENT, RECONCILE

#: The name of the task of `run_sweep`.
SWEEP = "workers.jobs.run_sweep"
#: The name of the task of `run_expire`.
EXPIRE = "workers.jobs.run_expire"
#: The name of the task of `run_schedules`.
SCHEDULES = "workers.jobs.run_schedules"


def schedule(settings: Settings) -> dict[str, Any]:
    """What beat sends, and when. A message that nobody took until three later ones were sent is dropped."""
    return {
        "sweep": _entry(SWEEP, settings.runs.sweep_every),
        "expire": _entry(EXPIRE, settings.runs.expire_every),
        "schedules": _entry(SCHEDULES, settings.schedules.check_every),
        "reconcile": _entry(RECONCILE, settings.fleet.reconcile_every),
        "defragment": _entry(DEFRAGMENT, settings.fleet.defragment_every),
    }


def _entry(task: str, every: timedelta) -> dict[str, Any]:
    options = {
        "queue": CONTROL_QUEUE,
        "priority": PRIORITIES["interactive"],
        "expires": max(every.total_seconds() * 3, 5),
        "ignore_result": True,
    }
    return {"task": task, "schedule": every, "options": options}
