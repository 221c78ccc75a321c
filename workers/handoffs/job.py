"""
The job of hand-offs: sends the messages that wait, confirms those whose run has ended, removes old ones.

Several control workers share the work; each message is sent by one.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.handoffs import advance, store
from workers import jobs
from workers.passes import time_limit
from workers.runtime import Runtime

#: Most seconds of a pass.
_SECONDS = 10.0
#: Most messages that a pass removes.
_REMOVED = 1_000


def run_handoffs(runtime: Runtime) -> Mapping[str, object] | None:
    """Send, confirm and remove messages. Raises Unavailable."""
    sent, confirmed = advance.advance(runtime.runs, time_limit(_SECONDS))
    settings = runtime.settings.handoffs
    with runtime.runs.database.work() as work:
        removed = store.remove_old(work, settings.retention, settings.retention_unresolved, _REMOVED)
    if sent or confirmed:
        runtime.activity.note()
    jobs.note_if(runtime, store.is_near)
    done = {"sent": sent, "confirmed": confirmed, "removed": removed}
    return done if any(done.values()) else None
