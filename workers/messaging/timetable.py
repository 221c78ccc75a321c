"""
The timetable of beat: the scheduled jobs by name, and their intervals.

It imports only what beat needs, so that beat starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from app.governance.jobs.job import JobChange, Trigger
from app.governance.jobs.registry import JOBS
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES
from app.kernel.settings import Settings


def schedule(settings: Settings, changes: Mapping[str, JobChange] = MappingProxyType({})) -> dict[str, Any]:
    """
    Return the schedule of beat, with what operators have changed. Paused jobs are not in it.

    A message expires after three intervals (at least 5 s).
    """
    entries = {}
    for job in JOBS:
        change = changes.get(job.name, JobChange())
        if job.is_enabled(settings) and not change.is_paused:
            trigger = change.trigger or Trigger(job.every(settings))
            entries[job.name] = _entry(job.task, trigger.sent_every)
    return entries


def _entry(task: str, every: timedelta) -> dict[str, Any]:
    options = {
        "queue": CONTROL_QUEUE,
        "priority": PRIORITIES["interactive"],
        "expires": max(every.total_seconds() * 3, 5),
        "ignore_result": True,
    }
    return {"task": task, "schedule": every, "options": options}
