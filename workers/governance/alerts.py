"""
The job of alerts: writes the notifications that are due, and delivers them.

One control worker at a time writes; all of them deliver, each notification by one.
"""

from __future__ import annotations

from app.governance import retention
from app.governance.alerts import dispatch, store
from app.governance.tasks import ALERTS
from app.kernel import log
from app.kernel.errors import Unavailable
from workers import jobs
from workers.governance.delivery import deliveries
from workers.passes import exclusive, time_limit
from workers.runtime import Runtime

_log = log.get(__name__)

#: Most seconds of a pass.
_SECONDS = 10.0


def run_alerts(runtime: Runtime) -> None:
    """Write and deliver the notifications that are due, and remove what is no longer kept."""
    database, settings = runtime.runs.database, runtime.settings
    with exclusive(ALERTS) as acquired:
        if not acquired:
            return
        try:
            written = dispatch.dispatch(database, settings.alerts)
            sent = deliveries.deliver_due(database, settings, runtime.secrets, time_limit(_SECONDS))
            retention.remove_old(database, settings.alerts, settings.actions)
        except Unavailable as error:
            _log.warning("alerts_postponed", error=str(error))
            return
        if written or sent:
            runtime.activity.note()
        jobs.note_if(runtime, store.is_near)
