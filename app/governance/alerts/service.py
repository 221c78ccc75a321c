"""
The alert service: open, count, acknowledge and resolve alerts.

`fired` and `cleared` run in the transaction in which a rule fires or clears: either both are stored, or none.
The same alert is sent at most once in its cooldown, also when it was resolved and opened again in between: the cooldown
belongs to the fingerprint. What comes within it is counted, and sent at its end if the alert is then still open.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from app.governance.actions.action import AlertAction
from app.governance.actions.execution import Cause
from app.governance.alerts import alert as alerts
from app.governance.alerts import store
from app.governance.alerts.alert import AlertEventKind
from app.kernel import log
from app.kernel.database import UnitOfWork
from app.kernel.sections.governance import AlertSettings

_log = log.get(__name__)

#: Most characters of the value of a label.
_LABEL = 200


@dataclass(frozen=True, slots=True)
class AlertService:
    """Opens and resolves the alerts of rules."""

    settings: AlertSettings

    def fired(self, work: UnitOfWork, cause: Cause, action: AlertAction, cooldown: timedelta | None = None) -> UUID:
        """
        Open the alert of a firing, or count the firing when it is open. Returns its id.

        `cooldown` is that of the rule; the action's has precedence.
        """
        labels = {name: str(value)[:_LABEL] for name, value in cause.labels.items()}
        print_ = alerts.fingerprint(cause.rule, labels)
        known = alerts.all_labels(cause.rule, cause.severity, labels)
        values = {
            "namespace": cause.namespace,
            "fingerprint": print_,
            "rule": cause.rule,
            "severity": cause.severity,
            "summary": cause.summary,
            "labels": labels,
            "value": cause.value,
            "group_key": alerts.group_key(action.group_by, known),
            "channels": action.channels,
            "cooldown": action.cooldown or cooldown or self.settings.cooldown,
            "repeat": action.repeat,
        }
        store.lock(work, cause.namespace, print_)
        found = store.find_open(work, cause.namespace, print_)
        if found is not None:
            store.count(work, found.id, values)
            return found.id
        quiet = store.quiet_until(work, cause.namespace, print_)
        id_ = store.insert(work, {**values, "quiet_until": quiet, "wait": self.settings.group_wait})
        store.add_event(work, id_, AlertEventKind.OPENED, detail=cause.summary)
        work.after_commit(lambda: _log.info("alert_opened", alert_id=str(id_), rule=cause.rule, **labels_of(labels)))
        return id_

    def cleared(self, work: UnitOfWork, cause: Cause) -> UUID | None:
        """Resolve the alert of a firing that has cleared. Returns its id, or None without an open one."""
        labels = {name: str(value)[:_LABEL] for name, value in cause.labels.items()}
        print_ = alerts.fingerprint(cause.rule, labels)
        store.lock(work, cause.namespace, print_)
        found = store.find_open(work, cause.namespace, print_)
        if found is None or not store.resolve(work, found.id, cause.author):
            return None
        store.add_event(work, found.id, AlertEventKind.RESOLVED, cause.author, "the rule has cleared")
        id_ = found.id
        work.after_commit(lambda: _log.info("alert_resolved", alert_id=str(id_), rule=cause.rule))
        return id_


def labels_of(labels: dict[str, str]) -> dict[str, str]:
    """Return the labels as keys of a log line, which has keys of its own."""
    return {f"label_{name}": value for name, value in labels.items()}
