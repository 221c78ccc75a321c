"""The removal of resolved alerts, ended silences, notifications and executions whose retention is over."""

from __future__ import annotations

from sqlalchemy import text

from app.governance.actions import store as action_store
from app.governance.alerts import silences
from app.kernel.database import Database
from app.kernel.sections.governance import ActionSettings, AlertSettings

#: Rows of each kind that one pass removes: a pass a second removes more than a rule can make.
BATCH = 200

_ALERTS = text("""
    DELETE FROM alert WHERE id IN (
        SELECT id FROM alert WHERE state = 'resolved' AND resolved_at < now() - CAST(:retention AS interval)
          AND (quiet_until IS NULL OR quiet_until < now()) AND due_at IS NULL
        ORDER BY resolved_at LIMIT :limit
    )
""")
_NOTIFICATIONS = text("""
    DELETE FROM alert_notification WHERE id IN (
        SELECT id FROM alert_notification WHERE created_at < now() - CAST(:retention AS interval)
          AND state <> 'pending' ORDER BY created_at LIMIT :limit
    )
""")


def remove_old(database: Database, alerts: AlertSettings, actions: ActionSettings) -> int:
    """Remove some of what is no longer kept. Returns the number of rows."""
    values = {"retention": alerts.retention, "limit": BATCH}
    with database.work() as work:
        removed = work.run(_ALERTS, values) + work.run(_NOTIFICATIONS, values)
        removed += silences.remove(work, alerts.retention)
        return removed + action_store.remove(work, actions.retention, BATCH)
