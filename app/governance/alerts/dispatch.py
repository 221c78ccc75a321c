"""
Dispatch: writes the notifications of alerts that are due.

One control worker at a time dispatches, so that a group is sent together and once. The notifications are stored with
the start of the cooldown in one transaction: after a crash either both hold or none. Delivery follows, and may repeat.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.governance.alerts import channel_store, silences, store
from app.governance.alerts.alert import Alert, AlertEventKind, AlertState, all_labels
from app.governance.alerts.channels import LOG, SEVERITIES, AlertChannel, AnyChannel, LogChannel
from app.governance.alerts.notification import NotificationKind
from app.kernel import log
from app.kernel.database import Database, UnitOfWork
from app.kernel.errors import InvalidInput
from app.kernel.sections.governance import AlertSettings

_log = log.get(__name__)

#: Most alerts of one pass, and those that one notification describes.
BATCH, _LISTED = 500, 50
_ALWAYS = LogChannel.model_validate({"kind": "log"})


@dataclass(frozen=True, slots=True)
class _Group:
    """Alerts that are sent together."""

    namespace: str
    group_key: str
    channels: tuple[str, ...]
    kind: NotificationKind


def dispatch(database: Database, settings: AlertSettings) -> int:
    """Write the notifications that are due. Returns their number; 0 while another worker dispatches."""
    with database.work() as work:
        now = store.try_to_compose(work)
        if now is None:
            return 0
        found = store.due(work, BATCH)
        if not found:
            return 0
        quiet = silences.active(work)
        groups: dict[_Group, list[Alert]] = defaultdict(list)
        for alert in found:
            silence = silences.silencing(quiet, alert.namespace, _labels(alert))
            if silence is not None:
                _hold_back(work, alert, silence.ends_at, str(silence.id))
            elif alert.state == AlertState.RESOLVED:
                groups[_group_of(alert, NotificationKind.RESOLVED)].append(alert)
            elif alert.state == AlertState.OPEN:
                groups[_group_of(alert, NotificationKind.FIRING)].append(alert)
            else:
                store.postpone(work, alert.id, None)
        known = {(one.namespace, one.name): one for one in channel_store.page(work, None)} if groups else {}
        return sum(_send(work, group, alerts, known, settings, now) for group, alerts in groups.items())


def _group_of(alert: Alert, kind: NotificationKind) -> _Group:
    return _Group(alert.namespace, alert.group_key, tuple(alert.channels), kind)


def _labels(alert: Alert) -> dict[str, str]:
    return all_labels(alert.rule, alert.severity, alert.labels)


def _hold_back(work: UnitOfWork, alert: Alert, until: datetime, silence: str) -> None:
    if alert.state == AlertState.RESOLVED:
        store.mark_end_told(work, [alert.id])
        return
    store.postpone(work, alert.id, until)
    store.add_event(work, alert.id, AlertEventKind.SILENCED, detail=f"by the silence {silence}")


def _send(
    work: UnitOfWork,
    group: _Group,
    alerts: Sequence[Alert],
    known: Mapping[tuple[str, str], AlertChannel],
    settings: AlertSettings,
    now: datetime,
) -> int:
    """Write the notifications of a group. Returns their number."""
    ids_ = [alert.id for alert in alerts]
    if group.kind is NotificationKind.FIRING:
        told = store.group_told_at(work, group.namespace, group.group_key)
        if told is not None and now < told + settings.group_interval:
            for id_ in ids_:
                store.postpone(work, id_, told + settings.group_interval)
            return 0
        store.mark_notified(work, ids_)
    else:
        store.mark_end_told(work, ids_)
    severity = max((alert.severity for alert in alerts), key=SEVERITIES.index)
    chosen = _channels(group, severity, known)
    document = _document(group, alerts, settings, now)
    for name in chosen:
        store.add_notification(work, (group.namespace, name), group.kind, document, alerts)
    if group.kind is NotificationKind.FIRING:
        for id_ in ids_:
            store.add_event(work, id_, AlertEventKind.NOTIFIED, detail=", ".join(chosen) or "no channel takes it")
    return len(chosen)


def _channels(group: _Group, severity: str, known: Mapping[tuple[str, str], AlertChannel]) -> list[str]:
    """The names of the channels that take a group; the log, when its rule names none that there is."""
    of_namespace = {name: one for (namespace, name), one in known.items() if namespace == group.namespace}
    fields: dict[str, AnyChannel] = {LOG: _ALWAYS}
    for name, channel in of_namespace.items():
        try:
            fields[name] = channel.fields
        except InvalidInput as error:
            _log.error("channel_invalid", channel=name, namespace=group.namespace, error=str(error))
    wanted = [name for name in group.channels if name in fields]
    if missing := set(group.channels) - set(wanted):
        _log.warning("channel_unknown", channels=sorted(missing), namespace=group.namespace)
    if not group.channels:
        wanted = [name for name, one in fields.items() if one.default]
    wanted = [name for name in wanted if not (name in of_namespace and of_namespace[name].disabled)] or [LOG]
    is_end = group.kind is NotificationKind.RESOLVED
    return [name for name in wanted if fields[name].takes(severity) and (fields[name].resolved or not is_end)]


def _document(group: _Group, alerts: Sequence[Alert], settings: AlertSettings, now: datetime) -> dict[str, Any]:
    """The body of a notification, in the form of Standard Webhooks."""
    return {
        "type": f"alert.{group.kind.value}",
        "timestamp": now.isoformat(),
        "data": {
            "namespace": group.namespace,
            "group": json.loads(group.group_key),
            "total": len(alerts),
            "alerts": [_shown(alert, settings) for alert in alerts[:_LISTED]],
        },
    }


def _shown(alert: Alert, settings: AlertSettings) -> dict[str, Any]:
    link = {"url": f"{settings.link}/v1/alerts/{alert.id}"} if settings.link else {}
    return {
        "id": str(alert.id),
        "fingerprint": alert.fingerprint,
        "rule": alert.rule,
        "severity": alert.severity,
        "state": alert.state,
        "summary": alert.summary,
        "labels": alert.labels,
        "value": alert.value,
        "count": alert.count,
        "first_at": alert.first_at.isoformat(),
        "last_at": alert.last_at.isoformat(),
        "resolved_at": None if alert.resolved_at is None else alert.resolved_at.isoformat(),
        **link,
    }
