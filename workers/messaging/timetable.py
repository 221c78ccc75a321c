"""
The timetable of beat: the scheduled jobs by name, and their intervals.

It imports only what beat needs, so that beat starts quickly.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from app.governance.jobs.registry import JOBS
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES
from app.kernel.settings import Settings


def schedule(settings: Settings) -> dict[str, Any]:
    """Return the schedule of beat. A message expires after three intervals (at least 5 s)."""
    return {job.name: _entry(job.task, job.every(settings)) for job in JOBS if job.is_enabled(settings)}


def _entry(task: str, every: timedelta) -> dict[str, Any]:
    options = {
        "queue": CONTROL_QUEUE,
        "priority": PRIORITIES["interactive"],
        "expires": max(every.total_seconds() * 3, 5),
        "ignore_result": True,
    }
    return {"task": task, "schedule": every, "options": options}
