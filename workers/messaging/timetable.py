"""
The timetable of beat: the scheduled jobs by task name, and their intervals.

It imports only what beat needs, so that beat starts quickly.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from app.inference.batches.tasks import BATCHES
from app.kernel.broker import CONTROL_QUEUE, PRIORITIES
from app.kernel.settings import Settings
from app.memory.consolidation.tasks import CONSOLIDATION
from app.memory.memories.tasks import EXTRACTION
from app.memory.personal.tasks import IMPORT_FOLDER
from app.scheduler.tasks import DEFRAGMENT, RECONCILE

#: The task name of `run_sweep`.
SWEEP = "workers.jobs.run_sweep"
#: The task name of `run_expire`.
EXPIRE = "workers.jobs.run_expire"
#: The task name of `run_conversation_expiry`.
EXPIRE_CONVERSATIONS = "workers.memory.expiry.run_conversation_expiry"
#: The task name of `run_schedules`.
SCHEDULES = "workers.jobs.run_schedules"
#: The task name of `run_recall`.
RECALL = "workers.memory.jobs.run_recall"


def schedule(settings: Settings) -> dict[str, Any]:
    """Return the schedule of beat. A message expires after three intervals (at least 5 s)."""
    watched = settings.context.folder is not None
    return {
        "sweep": _entry(SWEEP, settings.runs.sweep_every),
        "expire": _entry(EXPIRE, settings.runs.expire_every),
        "expire_conversations": _entry(EXPIRE_CONVERSATIONS, settings.conversations.expire_every),
        "batches": _entry(BATCHES, settings.batches.check_every),
        "memories": _entry(EXTRACTION, settings.memories.check_every),
        "consolidation": _entry(CONSOLIDATION, settings.consolidation.check_every),
        "recall": _entry(RECALL, settings.recall.check_every),
        "schedules": _entry(SCHEDULES, settings.schedules.check_every),
        "reconcile": _entry(RECONCILE, settings.fleet.reconcile_every),
        "defragment": _entry(DEFRAGMENT, settings.fleet.defragment_every),
        **({"context_folder": _entry(IMPORT_FOLDER, settings.context.check_every)} if watched else {}),
    }


def _entry(task: str, every: timedelta) -> dict[str, Any]:
    options = {
        "queue": CONTROL_QUEUE,
        "priority": PRIORITIES["interactive"],
        "expires": max(every.total_seconds() * 3, 5),
        "ignore_result": True,
    }
    return {"task": task, "schedule": every, "options": options}
