"""Alerts and actions through the client."""

from __future__ import annotations

from app.governance.actions import action as actions
from app.governance.actions.action import AlertAction
from app.governance.actions.execution import Cause
from app.governance.alerts.service import AlertService
from app.kernel.database import Database
from app.kernel.sections.governance import AlertSettings
from arriero_client import Client


def test_alerts_and_actions_from_the_first_to_the_last_operation(api: str, database: Database) -> None:
    (action,) = actions.parse(["alert"])
    assert isinstance(action, AlertAction)
    with database.work() as work:
        cause = Cause("errors-high", "error rate 0.2 > 0.05", labels={"model": "a"})
        made = str(AlertService(AlertSettings()).fired(work, cause, action))

    with Client(api) as client:
        assert [one.id for one in client.alerts(severity="warning")] == [made]
        assert client.acknowledge_alert(made, "mine").state == "acknowledged"
        assert client.silence_alerts({"rule": "errors*"}, "1h")
        assert client.resolve_alert(made).state == "resolved"
        assert client.alerts() == []
        assert [one.summary for one in client.alerts(states=["resolved"])] == ["error rate 0.2 > 0.05"]
        assert client.alert(made).model_extra is not None
        assert client.act("resize_slots", model="a", slots=2, reason="try").state == "pending"
        assert [one.kind for one in client.actions(state="pending")] == ["resize_slots"]
