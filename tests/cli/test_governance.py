"""`arriero alerts` and `arriero actions`."""

from __future__ import annotations

import json

import pytest

from app.governance.actions import action as actions
from app.governance.actions.action import AlertAction
from app.governance.actions.execution import Cause
from app.governance.alerts.service import AlertService
from app.kernel.database import Database
from app.kernel.errors import Conflict, InvalidInput
from app.kernel.sections.governance import AlertSettings
from tests.cli.conftest import Arriero

CAUSE = Cause("errors-high", "error rate 0.2 > 0.05", "critical", labels={"model": "a"})


def fire(database: Database) -> str:
    (found,) = actions.parse(["alert"])
    assert isinstance(found, AlertAction)
    with database.work() as work:
        return str(AlertService(AlertSettings()).fired(work, CAUSE, found))


def test_an_alert_is_listed_acknowledged_silenced_and_resolved(arriero: Arriero, database: Database) -> None:
    assert "there is no alert" in arriero("alerts", "list").stdout
    alert = fire(database)

    assert "error rate 0.2 > 0.05" in arriero("alerts", "list", "--severity", "critical").stdout
    assert "is acknowledged" in arriero("alerts", "ack", alert, "--note", "I look at it").stdout
    assert "I look at it" in arriero("alerts", "show", alert).stdout
    arriero("alerts", "silence", "2h", "--alert", alert)
    made = json.loads(arriero("alerts", "silence", "1h", "--label", "rule=errors*", "--json").stdout)
    assert arriero("alerts", "silences").stdout.count("rule=errors") == 2
    arriero("alerts", "unsilence", made["id"])
    assert arriero("alerts", "silences").stdout.count("rule=errors") == 1
    assert "is resolved" in arriero("alerts", "resolve", alert).stdout
    assert "there is no alert" in arriero("alerts", "list").stdout
    assert "resolved" in arriero("alerts", "list", "--all").stdout
    with pytest.raises(Conflict, match="is resolved"):
        arriero("alerts", "ack", alert)


def test_a_channel_is_stored_tested_and_deleted(arriero: Arriero) -> None:
    url = "https://hooks.example.com/x"
    arriero("alerts", "set-channel", "ops", "webhook", "--default", "--option", f"url={url}", "--option", "secret=hook")
    arriero("alerts", "set-channel", "team", "email", "--option", 'to=["ana@example.com"]')
    listed = json.loads(arriero("alerts", "channels", "--json").stdout)["channels"]
    assert [(one["name"], one["options"]) for one in listed] == [
        ("ops", {"default": True, "url": url, "secret": "hook"}),
        ("team", {"to": ["ana@example.com"]}),
    ]
    assert "arriero alerts sent" in arriero("alerts", "test", "ops").stdout
    assert "pending" in arriero("alerts", "sent").stdout
    arriero("alerts", "delete-channel", "team")
    with pytest.raises(InvalidInput, match="url: it is not a URL"):
        arriero("alerts", "set-channel", "x", "webhook", "--option", "url=y")


def test_an_action_is_requested_listed_and_refused_when_it_is_no_action(arriero: Arriero) -> None:
    resize = ("actions", "run", "resize_slots", "--set", "model=a")
    made = json.loads(arriero(*resize, "--set", "slots=2", "--reason", "try", "--json").stdout)
    assert (made["state"], made["parameters"]["slots"], made["cause"]["summary"]) == ("pending", 2, "try")
    assert "model a" in arriero("actions", "list").stdout
    assert "by" in arriero("actions", "show", made["id"]).stdout
    assert "quarantine_host" in arriero("actions", "kinds").stdout
    with pytest.raises(Conflict, match="holds nothing"):
        arriero("actions", "undo", made["id"])
    with pytest.raises(InvalidInput, match=r"action\.slots.*an integer from 1 to 256"):
        arriero(*resize, "--set", "slots=many")
    with pytest.raises(InvalidInput, match="belongs to a rule"):
        arriero("actions", "run", "alert")
