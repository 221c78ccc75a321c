"""What is sent, when, and how often."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta

from app.governance.actions.execution import Cause
from app.governance.alerts import dispatch, silences, store
from app.kernel.sections.governance import AlertSettings
from tests.governance.alerts.conftest import AlertWorld, Received

CAUSE = Cause("errors-high", "error rate 0.2 > 0.05", "critical", labels={"model": "a"}, value=0.2)


def test_a_thousand_firings_are_one_notification_per_cooldown(world: AlertWorld, receiver: Received) -> None:
    """With two control workers that send, while four others raise the same alert."""
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            world.work()

    def raise_(number: int) -> None:
        for turn in range(250):
            world.fire(replace(CAUSE, summary=f"firing {number}.{turn}"))
            if turn % 50 == 49:  # flapping begins no cooldown anew
                world.clear(CAUSE)

    senders = [threading.Thread(target=send) for _ in range(2)]
    firing = [threading.Thread(target=raise_, args=(number,)) for number in range(4)]
    for thread in [*senders, *firing]:
        thread.start()
    for thread in firing:
        thread.join()
    world.fire(CAUSE)
    ended.set()
    for thread in senders:
        thread.join()
    world.work()
    firings = [one for one in receiver.documents() if one["type"] == "alert.firing"]
    assert len(firings) == 1

    for _ in range(3):
        world.pass_time("15 minutes")
        world.work()
        world.work()
    firings = [one for one in receiver.documents() if one["type"] == "alert.firing"]
    assert len(firings) == 2, "one more at the end of the cooldown, for all that came within it"
    assert sum(alert.count for alert in world.alerts()) == 1001
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == len(receiver.requests)


def test_an_alert_that_ended_is_told_once_to_those_who_heard_of_it(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    world.channel("quiet", kind="webhook", url=receiver.url, default=True, resolved=False)
    world.fire(CAUSE)
    world.work()
    world.clear(CAUSE)
    world.work()
    world.work()

    assert sorted(one["type"] for one in receiver.documents()) == ["alert.firing", "alert.firing", "alert.resolved"]
    assert world.events() == ["opened", "notified", "resolved"]

    # One that clears before it was sent is not told at all.
    world.fire(replace(CAUSE, labels={"model": "b"}))
    world.clear(replace(CAUSE, labels={"model": "b"}))
    world.work()
    assert len(receiver.requests) == 3


def test_alerts_of_a_rule_are_one_notification(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    for model in "abc":
        world.fire(replace(CAUSE, labels={"model": model}))
    world.fire(replace(CAUSE, rule="slow"))
    world.work()

    assert sorted(one["data"]["total"] for one in receiver.documents()) == [1, 3]


def test_a_group_that_grows_is_sent_once_in_its_interval(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    alerts = AlertSettings(group_wait=timedelta(0), group_interval=timedelta(minutes=1))
    world.settings = world.settings.model_copy(update={"alerts": alerts})
    for model in "abc":
        world.fire(replace(CAUSE, labels={"model": model}))
        world.work()
    assert [one["data"]["total"] for one in receiver.documents()] == [1]

    world.pass_time("1 minute")
    world.work()
    assert [one["data"]["total"] for one in receiver.documents()] == [1, 2]


def test_an_acknowledged_alert_is_not_sent_again(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    again = {"kind": "alert", "repeat": "1h"}
    world.fire(CAUSE, again)
    world.work()
    world.pass_time("1 hour")
    world.work()
    assert len(receiver.requests) == 2, "it is repeated while nobody has acknowledged it"

    (alert,) = world.alerts()
    with world.database.work() as work:
        assert store.acknowledge(work, alert.id, "ana")
        assert not store.acknowledge(work, alert.id, "ana")
    world.fire(CAUSE, again)
    world.pass_time("2 hours")
    world.work()
    assert len(receiver.requests) == 2


def test_a_silenced_alert_is_sent_when_the_silence_ends_and_it_is_open(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    with world.database.work() as work:
        silences.add(work, "", {"rule": "errors*", "model": "a"}, timedelta(hours=1), "maintenance", "ana")
        silences.add(work, "acme", {"rule": "slow"}, timedelta(hours=1), "not of this namespace", "ana")
    world.fire(CAUSE)
    world.fire(replace(CAUSE, rule="slow"))
    world.work()
    assert [one["data"]["alerts"][0]["rule"] for one in receiver.documents()] == ["slow"]
    assert "silenced" in world.events()

    world.pass_time("1 hour")
    world.work()
    assert [one["data"]["alerts"][0]["rule"] for one in receiver.documents()] == ["slow", "errors-high"]


def test_channels_take_alerts_from_their_severity_on_and_the_log_takes_the_rest(
    world: AlertWorld, receiver: Received, capsys: object
) -> None:
    world.channel("pager", kind="webhook", url=receiver.url, min_severity="critical")
    world.fire(replace(CAUSE, severity="warning"), {"kind": "alert", "channels": ["pager"]})
    world.fire(replace(CAUSE, rule="other"), {"kind": "alert", "channels": ["pager", "nowhere"]})
    world.fire(replace(CAUSE, rule="third"))
    world.fire(replace(CAUSE, rule="fourth", namespace="acme"), {"kind": "alert", "channels": ["pager"]})
    world.work()

    assert [(one.namespace, one.channel, one.state) for one in world.notifications()] == [
        ("", "log", "sent"),
        ("", "pager", "sent"),
        ("acme", "log", "sent"),
    ]
    assert [one["data"]["alerts"][0]["rule"] for one in receiver.documents()] == ["other"]


def test_only_one_worker_writes_notifications_at_a_time(world: AlertWorld) -> None:
    world.fire(CAUSE)
    with world.database.work() as work:
        assert store.try_to_compose(work) is not None
        assert dispatch.dispatch(world.database, world.settings.alerts) == 0
    assert dispatch.dispatch(world.database, world.settings.alerts) == 1
