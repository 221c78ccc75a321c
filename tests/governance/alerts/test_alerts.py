"""Alerts: opened once, counted, resolved, and quiet in their cooldown."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import text

from app.governance.actions import action as actions
from app.governance.actions.action import AlertAction
from app.governance.actions.execution import Cause
from app.governance.alerts.service import AlertService
from app.kernel.database import Database
from app.kernel.sections.governance import AlertSettings

CAUSE = Cause("errors-high", "error rate 0.2 > 0.05", "critical", labels={"model": "a"})


def alert_action() -> AlertAction:
    (found,) = actions.parse(["alert"])
    assert isinstance(found, AlertAction)
    return found


def test_firings_with_the_same_labels_are_one_alert(database: Database) -> None:
    service = AlertService(AlertSettings())
    with database.work() as work:
        first = service.fired(work, CAUSE, alert_action())
        same = service.fired(work, replace(CAUSE, summary="error rate 0.3 > 0.05"), alert_action())
        other = service.fired(work, replace(CAUSE, labels={"model": "b"}), alert_action())
        foreign = service.fired(work, replace(CAUSE, namespace="acme"), alert_action())
        row = work.row(text("SELECT count, summary, state FROM alert WHERE id = :id"), {"id": first})

    assert row == (2, "error rate 0.3 > 0.05", "open")
    assert first == same
    assert len({first, other, foreign}) == 3


def test_an_alert_that_opens_again_keeps_the_cooldown_of_the_last_one(database: Database) -> None:
    service = AlertService(AlertSettings())
    with database.work() as work:
        first = service.fired(work, CAUSE, alert_action())
        work.run(text("UPDATE alert SET quiet_until = now() + interval '1 hour', notifications = 1"))
        assert service.cleared(work, CAUSE) == first
        assert service.cleared(work, CAUSE) is None
        again = service.fired(work, CAUSE, alert_action())
        row = work.row(
            text("SELECT due_at > now() + interval '50 minutes' AS later FROM alert WHERE id = :id"), {"id": again}
        )

    assert again != first
    assert row is not None
    assert row.later
