"""
The job of alerts: writes the notifications that are due, and delivers them.

One control worker at a time writes; all of them deliver, each notification by one.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.governance import retention
from app.governance.alerts import dispatch, store
from workers import jobs
from workers.governance.delivery import deliveries
from workers.passes import time_limit
from workers.runtime import Runtime

#: Most seconds of a pass.
_SECONDS = 10.0


def run_alerts(runtime: Runtime) -> Mapping[str, object] | None:
    """Write and deliver the notifications that are due, and remove what is no longer kept. Raises Unavailable."""
    database, settings = runtime.runs.database, runtime.settings
    written = dispatch.dispatch(database, settings.alerts)
    attempts = deliveries.deliver_due(database, settings, runtime.secrets, time_limit(_SECONDS))
    removed = retention.remove_old(database, settings.alerts, settings.actions)
    if written or attempts:
        runtime.activity.note()
    jobs.note_if(runtime, store.is_near)
    done = {"notifications": written, "attempts": attempts, "removed": removed}
    return done if any(done.values()) else None
