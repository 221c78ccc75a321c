"""From a firing to its actions and alerts, and back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from sqlalchemy import text

from app.governance.responses import Responses
from app.governance.rules.firing import Firing, FiringState
from app.governance.rules.rule import Rule
from app.governance.tasks import ACTIONS, ALERTS
from app.kernel import ids
from app.kernel.broker import CONTROL_QUEUE, CeleryPublisher
from app.kernel.database import Database
from app.kernel.settings import Settings

RULE = {
    "rule": "errors-high",
    "category": "quality",
    "severity": "critical",
    "cooldown": "10m",
    "all": [{"signal": "error_rate", "operator": ">", "threshold": 0.05}],
    "by": "model",
    "actions": [
        {"action": "alert"},
        {"action": "switch_fallback", "with": {"to": ["gemma3:270m"]}},
        {"action": "of_another_version"},
    ],
}


def firing(state: FiringState = FiringState.FIRING) -> Firing:
    return Firing(
        id=ids.new_id(),
        rule_id=ids.new_id(),
        rule=Rule.model_validate(RULE),
        rule_version=1,
        namespace="",
        labels={"model": "smollm2:135m"},
        state=state,
        dry_run=False,
        pending_at=datetime.now(UTC),
        reason="error_rate 0.2 > 0.05",
        values={"0": {"holds": False, "value": 9.0}, "1": {"holds": True, "signal": "error_rate", "value": 0.2}},
    )


def test_a_firing_has_its_alert_and_its_actions_and_its_end_takes_them_back(
    database: Database, publisher: CeleryPublisher
) -> None:
    responses, fired = Responses(Settings, publisher), firing()
    with database.work() as work:
        responses.on_firing(work, fired)
        assert publisher.depth(CONTROL_QUEUE) == 0, "workers are woken after the commit"
    assert publisher.depth(CONTROL_QUEUE) == len({ACTIONS, ALERTS})

    with database.work() as work:
        (alert,) = work.rows(text("SELECT rule, severity, summary, value, cooldown, state, labels FROM alert"))
        (execution,) = work.rows(text("SELECT kind, target, state, firing_id FROM action_execution"))
        assert (alert.rule, alert.severity, alert.value, alert.state) == ("errors-high", "critical", 0.2, "open")
        assert alert.cooldown == fired.rule.cooldown
        assert execution == ("switch_fallback", "model smollm2:135m", "pending", fired.id)
        work.run(text("UPDATE action_execution SET state = 'applied'"))
    with database.work() as work:
        responses.on_cleared(work, replace(fired, state=FiringState.CLEARED))
    with database.work() as work:
        assert work.rows(text("SELECT state FROM alert")) == [("resolved",)]
        assert work.rows(text("SELECT state FROM action_execution")) == [("undoing",)]


def test_a_firing_that_is_not_stored_has_no_response(database: Database, publisher: CeleryPublisher) -> None:
    responses = Responses(Settings, publisher)
    try:
        with database.work() as work:
            responses.on_firing(work, firing())
            raise RuntimeError
    except RuntimeError:
        pass

    assert publisher.depth(CONTROL_QUEUE) == 0
    with database.work() as work:
        assert work.rows(text("SELECT FROM alert")) == work.rows(text("SELECT FROM action_execution")) == []
