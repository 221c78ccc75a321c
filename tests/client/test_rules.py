"""Signals and rules through the client, and through the API."""

from __future__ import annotations

from datetime import timedelta

import pytest

from app.governance.rules.evaluator import RuleEvaluator
from app.governance.signals.sample import Sample, SignalLabels
from app.governance.signals.store import SignalStore
from app.kernel.database import Database
from arriero_client import Client, ClientError
from workers.governance import evaluation

RULE = {
    "rule": "chat-fails",
    "category": "quality",
    "by": "model",
    "all": [{"signal": "error_rate", "operator": ">", "threshold": 0.2}],
}


def test_rules_from_the_first_to_the_last_operation(api: str, database: Database) -> None:
    labels = SignalLabels(model="chat", namespace="a")
    SignalStore(database).write([Sample("error_rate", failed, labels) for failed in (1, 1, 0, 0)])
    with Client(api) as client:
        assert {one.name: one.value for one in client.signals()}["error_rate"] == 0.5
        history = client.signal("error_rate", by="model", window="10m", labels={"model": "chat"})
        assert [(one["group"], one["statistics"]["mean"]) for one in history.values] == [("chat", 0.5)]
        assert [one["value"] for one in history.points] == [0.5]

        (would,) = client.try_rule(RULE, last="1h").firings
        assert (would["value"], would["cleared_at"]) == ("chat", None)
        assert client.rules() == []
        assert client.put_rule(RULE).version == 1
        assert client.put_rule({**RULE, "severity": "critical"}).version == 2
        evaluation.evaluate(RuleEvaluator(database, (), timedelta(minutes=1)))
        (firing,) = client.firings(rule="chat-fails", state="firing")
        assert (firing.labels, firing.reason) == ({"model": "chat"}, "error_rate is 50 % (mean in 5m), > 20 %")
        assert client.rule("chat-fails").state == "firing"
        assert client.disable_rule("chat-fails").state == "off"
        assert client.enable_rule("chat-fails").enabled
        assert len(client.try_rule("chat-fails", last="1h").firings) == 1
        client.delete_rule("chat-fails")
        with pytest.raises(ClientError, match="no rule 'chat-fails'"):
            client.rule("chat-fails")


def test_what_cannot_be_answered_is_said(api: str) -> None:
    with Client(api) as client:
        for call, expected in (
            (lambda: client.signal("error_rat"), "there are: .*error_rate"),
            (lambda: client.signal("error_rate", by="device"), "no label 'device'"),
            (lambda: client.signal("error_rate", statistic="p95"), "no 'p95'"),
            (lambda: client.signal("error_rate", window="800d"), "window"),
            (lambda: client.signal("error_rate", window="2d", resolution="minute"), "1d"),
            (lambda: client.try_rule(RULE, last="1s"), "10m to 31d"),
            (lambda: client.put_rule({**RULE, "actions": [{"action": "fly"}]}), "actions"),
            (lambda: client.firings(cursor="x"), "cursor"),
        ):
            with pytest.raises(ClientError, match=expected):
                call()
