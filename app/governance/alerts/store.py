"""
The statements of alerts and their notifications.

Every function runs in a transaction of its caller.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import text

from app.governance.alerts.alert import Alert, AlertEventKind
from app.governance.alerts.notification import AlertNotification, NotificationKind
from app.kernel import ids
from app.kernel.database import UnitOfWork
from app.kernel.errors import shortened

#: Most characters of a summary, and of a note.
_SENTENCE = 1_000

#: The namespace and the name of a channel.
ChannelKey = tuple[str, str]

COLUMNS = """
    id, namespace, fingerprint, rule, severity, summary, labels, value, group_key, channels, state, count,
    first_at, last_at, cooldown, repeat, quiet_until, due_at, notified_at, notifications, tell_end,
    acknowledged_at, acknowledged_by, resolved_at, resolved_by
"""
_NOTIFICATION = (
    "id, namespace, channel, kind, group_key, document, state, attempts, due_at, error, created_at, finished_at"
)

_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 7205759405))")
_FIND_OPEN = text(f"""
    SELECT {COLUMNS} FROM alert WHERE namespace = :namespace AND fingerprint = :fingerprint AND state <> 'resolved'
    FOR UPDATE
""")
_QUIET = text("""
    SELECT max(quiet_until) AS quiet_until FROM (
        SELECT quiet_until FROM alert WHERE namespace = :namespace AND fingerprint = :fingerprint
        ORDER BY id DESC LIMIT 3
    ) AS last
""")
_INSERT = text("""
    INSERT INTO alert (id, namespace, fingerprint, rule, severity, summary, labels, value, group_key, channels, state,
                       count, cooldown, repeat, quiet_until, due_at, notifications, tell_end)
    VALUES (:id, :namespace, :fingerprint, :rule, :severity, :summary, CAST(:labels AS json), :value, :group_key,
            CAST(:channels AS json), 'open', 1, :cooldown, :repeat, :quiet_until,
            GREATEST(now() + CAST(:wait AS interval), CAST(:quiet_until AS timestamptz)), 0, false)
""")
_COUNT = text("""
    UPDATE alert SET count = count + 1, last_at = now(), summary = :summary, value = :value, severity = :severity,
        cooldown = :cooldown, repeat = :repeat, channels = CAST(:channels AS json), group_key = :group_key,
        due_at = CASE WHEN state = 'open' THEN LEAST(due_at, GREATEST(now(), quiet_until)) END
    WHERE id = :id
""")
_RESOLVE = text("""
    UPDATE alert SET state = 'resolved', resolved_at = now(), resolved_by = :actor,
        tell_end = notifications > 0, due_at = CASE WHEN notifications > 0 THEN now() END
    WHERE id = :id AND state <> 'resolved'
""")
_ACKNOWLEDGE = text("""
    UPDATE alert SET state = 'acknowledged', acknowledged_at = now(), acknowledged_by = :actor, due_at = NULL
    WHERE id = :id AND state = 'open'
""")
_EVENT = text("""
    INSERT INTO alert_event (id, alert_id, kind, actor, detail) VALUES (:id, :alert, :kind, :actor, :detail)
""")
_DUE = text(f"SELECT {COLUMNS} FROM alert WHERE due_at <= now() ORDER BY due_at LIMIT :limit FOR UPDATE SKIP LOCKED")
_NOTIFIED = text("""
    UPDATE alert SET notified_at = now(), notifications = notifications + 1,
        quiet_until = now() + cooldown,
        due_at = CASE WHEN repeat IS NOT NULL THEN now() + GREATEST(repeat, cooldown) END
    WHERE id = :id
""")
_END_TOLD = text("UPDATE alert SET tell_end = false, due_at = NULL WHERE id = :id")
_POSTPONE = text("UPDATE alert SET due_at = :until WHERE id = :id")
_INSERT_NOTIFICATION = text("""
    INSERT INTO alert_notification (id, namespace, channel, kind, group_key, document, state, attempts)
    VALUES (:id, :namespace, :channel, :kind, :group_key, CAST(:document AS json), 'pending', 0)
""")
_GROUP_TOLD = text("""
    SELECT max(created_at) AS at FROM alert_notification
    WHERE namespace = :namespace AND group_key = :group_key AND kind = 'firing'
""")
_TRY_TO_COMPOSE = text("SELECT pg_try_advisory_xact_lock(7205759406) AS alone, now() AS now")
_INSERT_ITEM = text("INSERT INTO alert_notification_item (notification_id, alert_id) VALUES (:notification, :alert)")
_CLAIM = text(f"""
    UPDATE alert_notification SET attempts = attempts + 1, due_at = now() + CAST(:lease AS interval)
    WHERE id IN (
        SELECT id FROM alert_notification WHERE state = 'pending' AND due_at <= now()
        ORDER BY due_at LIMIT :limit FOR UPDATE SKIP LOCKED
    ) RETURNING {_NOTIFICATION}
""")
_FINISH = text("""
    UPDATE alert_notification SET state = :state, error = :error, finished_at = now()
    WHERE id = :id AND attempts = :attempts AND state = 'pending'
""")
_RETRY = text("""
    UPDATE alert_notification SET due_at = now() + CAST(:pause AS interval), error = :error
    WHERE id = :id AND attempts = :attempts AND state = 'pending'
""")
_IS_NEAR = text("""
    SELECT EXISTS (SELECT FROM alert WHERE due_at <= now() + CAST(:within AS interval))
        OR EXISTS (SELECT FROM alert_notification
                   WHERE state = 'pending' AND due_at <= now() + CAST(:within AS interval)) AS near
""")


def lock(work: UnitOfWork, namespace: str, fingerprint: str) -> None:
    """Lock the alerts with a fingerprint until the end of the transaction."""
    work.execute(_LOCK, {"key": f"alert:{namespace}/{fingerprint}"})


def find_open(work: UnitOfWork, namespace: str, fingerprint: str) -> Alert | None:
    """Return the open alert with a fingerprint, and lock its row."""
    return work.row_of(Alert, _FIND_OPEN, {"namespace": namespace, "fingerprint": fingerprint})


def quiet_until(work: UnitOfWork, namespace: str, fingerprint: str) -> datetime | None:
    """Return until when an alert with this fingerprint is not sent again: that of the last one. It is locked."""
    row = work.row(_QUIET, {"namespace": namespace, "fingerprint": fingerprint})
    return None if row is None else row.quiet_until


def insert(work: UnitOfWork, values: Mapping[str, Any]) -> UUID:
    """Insert an open alert, and return its id."""
    id_ = ids.new_id()
    work.execute(_INSERT, {**_stored(values), "id": id_})
    return id_


def count(work: UnitOfWork, id_: UUID, values: Mapping[str, Any]) -> None:
    """Count a further firing of an open alert."""
    work.execute(_COUNT, {**_stored(values), "id": id_})


def _stored(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **values,
        "summary": shortened(str(values["summary"]), _SENTENCE),
        "labels": json.dumps(values["labels"]),
        "channels": json.dumps(list(values["channels"])),
    }


def resolve(work: UnitOfWork, id_: UUID, actor: str) -> bool:
    """Resolve an alert; False when it was resolved."""
    return work.run(_RESOLVE, {"id": id_, "actor": actor}) == 1


def acknowledge(work: UnitOfWork, id_: UUID, actor: str) -> bool:
    """Acknowledge an open alert; False for one that is not open."""
    return work.run(_ACKNOWLEDGE, {"id": id_, "actor": actor}) == 1


def add_event(work: UnitOfWork, alert: UUID, kind: AlertEventKind, actor: str = "", detail: str = "") -> None:
    """Add an entry to the history of an alert."""
    values = {"id": ids.new_id(), "alert": alert, "kind": kind.value, "actor": actor}
    work.execute(_EVENT, {**values, "detail": shortened(detail, _SENTENCE)})


def due(work: UnitOfWork, limit: int) -> list[Alert]:
    """Return alerts of which a notification is due, and lock their rows. Those that others have locked are left out."""
    return work.rows_of(Alert, _DUE, {"limit": limit})


def mark_notified(work: UnitOfWork, ids_: Collection[UUID]) -> None:
    """Begin the cooldown of alerts."""
    for id_ in ids_:
        work.execute(_NOTIFIED, {"id": id_})


def mark_end_told(work: UnitOfWork, ids_: Collection[UUID]) -> None:
    """A notification of the end of these alerts is no longer owed."""
    for id_ in ids_:
        work.execute(_END_TOLD, {"id": id_})


def postpone(work: UnitOfWork, id_: UUID, until: datetime | None) -> None:
    """Look at an alert again at that instant."""
    work.execute(_POSTPONE, {"id": id_, "until": until})


def try_to_compose(work: UnitOfWork) -> datetime | None:
    """Return the time when this worker alone writes notifications until the end of the transaction; None otherwise."""
    row = work.row(_TRY_TO_COMPOSE)
    return row.now if row is not None and row.alone else None


def group_told_at(work: UnitOfWork, namespace: str, group_key: str) -> datetime | None:
    """Return when a group was last sent as firing."""
    row = work.row(_GROUP_TOLD, {"namespace": namespace, "group_key": group_key})
    return None if row is None else row.at


def add_notification(
    work: UnitOfWork, to: ChannelKey, kind: NotificationKind, document: Any, alerts: Sequence[Alert] = ()
) -> UUID:
    """Store a notification that is to be delivered, and return its id."""
    id_ = ids.new_id()
    group_key = alerts[0].group_key if alerts else ""
    values = {"id": id_, "namespace": to[0], "channel": to[1], "kind": kind.value, "group_key": group_key}
    work.execute(_INSERT_NOTIFICATION, {**values, "document": json.dumps(document)})
    for alert in alerts:
        work.execute(_INSERT_ITEM, {"notification": id_, "alert": alert.id})
    return id_


def claim(work: UnitOfWork, lease: timedelta, limit: int) -> list[AlertNotification]:
    """Take notifications that are due, for the time of a lease: no other worker sends them meanwhile."""
    return work.rows_of(AlertNotification, _CLAIM, {"lease": lease, "limit": limit})


def finish(work: UnitOfWork, claimed: AlertNotification, state: str, error: str = "") -> bool:
    """End a delivery; False when another worker has taken it since."""
    values = {"id": claimed.id, "attempts": claimed.attempts, "state": state, "error": shortened(error, _SENTENCE)}
    return work.run(_FINISH, values) == 1


def retry(work: UnitOfWork, claimed: AlertNotification, pause: timedelta, error: str) -> bool:
    """Try a delivery again after a pause; False when another worker has taken it since."""
    values = {"id": claimed.id, "attempts": claimed.attempts, "pause": pause, "error": shortened(error, _SENTENCE)}
    return work.run(_RETRY, values) == 1


def is_near(work: UnitOfWork, within: timedelta) -> bool:
    """Whether something is due within that time."""
    row = work.row(_IS_NEAR, {"within": within})
    return bool(row and row.near)
