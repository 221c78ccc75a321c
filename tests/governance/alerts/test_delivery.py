"""Deliveries: signed, retried over crashes, guarded; over HTTP, SMTP and apprise, to servers on loopback."""

from __future__ import annotations

import email
import email.policy
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from standardwebhooks import Webhook, WebhookVerificationError

from app.governance.actions.execution import Cause
from app.governance.alerts import channels, dispatch, notification
from app.governance.alerts import store as alert_store
from app.kernel.errors import InvalidInput
from app.kernel.security.secrets import Secrets
from tests.governance.alerts.conftest import AlertWorld, Received

CAUSE = Cause("errors-high", "error rate 0.2 > 0.05", "critical", labels={"model": "a"}, value=0.2)
SECRET = "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0"


def test_a_web_hook_is_signed_as_the_standard_says(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True, secret="hook")
    world.fire(CAUSE)
    world.work()

    ((headers, body),) = receiver.requests
    document = Webhook(SECRET).verify(body.decode(), headers)
    assert document["type"] == "alert.firing"
    (alert,) = document["data"]["alerts"]
    assert (alert["rule"], alert["severity"], alert["labels"]) == ("errors-high", "critical", {"model": "a"})
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.decode().replace("critical", "info"), headers)


def test_a_failed_web_hook_is_tried_again_with_the_same_id(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    receiver.statuses += [503, 429]
    receiver.headers = {"Retry-After": "3600"}
    world.fire(CAUSE)
    world.work()
    world.pass_time("10 seconds")
    world.work()
    assert len(receiver.requests) == 1, "the receiver asked for an hour"

    world.pass_time("1 hour")
    world.work()
    (waiting,) = world.notifications()
    assert (waiting.state, waiting.attempts) == ("pending", 2)
    assert "returned 429" in waiting.error
    world.pass_time("2 hours")
    world.work()
    (sent,) = world.notifications()
    assert (sent.state, sent.attempts) == ("sent", 3)
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1


def test_a_delivery_outlives_the_worker_that_had_it(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    world.fire(CAUSE)
    with world.database.work() as work:
        assert alert_store.claim(work, timedelta(minutes=1), 5) == []
    dispatch.dispatch(world.database, world.settings.alerts)
    with world.database.work() as work:  # this worker dies
        (taken,) = alert_store.claim(work, timedelta(minutes=1), 5)
    world.work()
    assert receiver.requests == []

    world.pass_time("1 minute")
    world.work()
    assert len(receiver.requests) == 1
    with world.database.work() as work:  # the dead one has no say any more
        assert not alert_store.finish(work, taken, "failed", "late")


def test_the_pauses_grow_and_end() -> None:
    pauses = [notification.pause_after(attempt, 0.5) for attempt in range(1, 10)]

    assert pauses[:3] == [timedelta(seconds=5), timedelta(seconds=30), timedelta(minutes=2)]
    assert pauses[-1] is None
    known = [pause for pause in pauses if pause is not None]
    assert known == sorted(known)
    assert notification.pause_after(1, 0.5, timedelta(days=9)) == timedelta(days=1)


def test_a_receiver_that_is_gone_is_sent_nothing_more(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    receiver.statuses += [410]
    world.fire(CAUSE)
    world.work()
    world.fire(replace(CAUSE, rule="other"))
    world.work()

    assert [(one.channel, one.state) for one in world.notifications()] == [("ops", "failed"), ("log", "sent")]
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "http://127.0.0.1:1/", "http://localhost:1/"])
def test_a_web_hook_reaches_no_host_that_is_not_allowed(world: AlertWorld, url: str) -> None:
    world.channel("ops", kind="webhook", url=url, default=True)
    world.fire(CAUSE)
    world.work()

    (kept,) = world.notifications()
    assert kept.state == "pending"
    assert "http.allowed_hosts does not list" in kept.error


def test_no_secret_is_shown_by_a_failure(world: AlertWorld, receiver: Received) -> None:
    hidden = f"{receiver.url}/T000/veryhidden?token=alsohidden"
    world.secrets = Secrets(None, {"ARRIERO_SECRET_PLACE": hidden, "ARRIERO_SECRET_TOKEN": "Bearer reallyhidden"})
    headers = {"Authorization": "token"}
    world.channel("ops", kind="webhook", url_secret="place", header_secrets=headers, default=True)
    receiver.statuses += [400, 400]
    world.fire(CAUSE)
    world.work()

    ((sent, _),) = receiver.requests
    assert sent["authorization"] == "Bearer reallyhidden"
    (kept,) = world.notifications()
    assert "returned 400" in kept.error
    assert "hidden" not in kept.error


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"kind": "pigeon"}, "kind"),
        ({"kind": "webhook"}, "url"),
        ({"kind": "webhook", "url": "ftp://x"}, "url"),
        ({"kind": "webhook", "url": "https://user:pass@x/"}, "url"),
        ({"kind": "webhook", "url": "https://x\r\nHost: y"}, "url"),
        ({"kind": "webhook", "url": "https://x", "secret": "whsec_abc"}, "secret"),
        ({"kind": "email", "to": ["a@b\nBcc: c@d"]}, "to.0"),
        ({"kind": "email", "to": []}, "to"),
        ({"kind": "log", "url": "x"}, "url"),
        (["log"], ""),
    ],
)
def test_an_invalid_channel_is_refused_with_its_field(document: Any, where: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        channels.parse(document, "")
    assert raised.value.problems[0].where == where


def test_apprise_is_for_operators_only() -> None:
    with pytest.raises(InvalidInput, match="only operators"):
        channels.parse({"kind": "apprise", "url_secret": "chat"}, "acme")


class _Mail:
    """Takes mail, or refuses recipients."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.refuse = ""

    async def handle_RCPT(self, _: Any, __: Any, envelope: Any, address: str, ___: Any) -> str:  # noqa: N802 its name
        if self.refuse:
            return self.refuse
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _: Any, __: Any, envelope: Any) -> str:  # noqa: N802 its name
        self.messages.append((envelope, email.message_from_bytes(envelope.content, policy=email.policy.default)))
        return "250 OK"


@pytest.fixture
def mail(world: AlertWorld) -> Iterator[_Mail]:
    handler = _Mail()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    controller = Controller(handler, hostname="127.0.0.1", port=port)
    controller.start()
    more = {"smtp_host": "127.0.0.1", "smtp_port": port, "smtp_security": "none", "smtp_from": "arriero@example.com"}
    alerts = world.settings.alerts.model_copy(update=more)
    world.settings = world.settings.model_copy(update={"alerts": alerts})
    yield handler
    controller.stop()


def test_an_alert_arrives_by_mail(world: AlertWorld, mail: _Mail) -> None:
    world.channel("team", kind="email", to=["ana@example.com", "bo@example.com"], default=True)
    world.fire(replace(CAUSE, summary="error rate\r\nBcc: all@example.com 0.2 > 0.05"))
    world.work()

    ((envelope, message),) = mail.messages
    assert envelope.rcpt_tos == ["ana@example.com", "bo@example.com"]
    assert message["Subject"].startswith("[CRITICAL] errors-high: error rate")
    assert message["Bcc"] is None
    assert "labels: model=a" in message.get_content()
    (sent,) = world.notifications()
    assert message["Message-ID"] == f"<{sent.id}@arriero.invalid>"
    assert sent.state == "sent"


@pytest.mark.parametrize(("reply", "state"), [("451 later", "pending"), ("550 no such user", "failed")])
def test_a_refused_mail_is_tried_again_unless_the_refusal_is_final(
    world: AlertWorld, mail: _Mail, reply: str, state: str
) -> None:
    mail.refuse = reply
    world.channel("team", kind="email", to=["ana@example.com"], default=True)
    world.fire(CAUSE)
    world.work()

    (kept,) = world.notifications()
    assert (kept.state, reply in kept.error) == (state, True)


def test_mail_without_a_server_says_which_setting_is_missing(world: AlertWorld) -> None:
    world.channel("team", kind="email", to=["ana@example.com"], default=True)
    world.fire(CAUSE)
    world.work()

    (kept,) = world.notifications()
    assert kept.error == "no server of e-mail is set (alerts.smtp_host, alerts.smtp_from)"


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
def test_apprise_tells_its_services(world: AlertWorld, receiver: Received) -> None:
    pytest.importorskip("apprise")
    world.secrets = Secrets(None, {"ARRIERO_SECRET_CHAT": receiver.url.replace("http://", "json://")})
    world.channel("chat", kind="apprise", url_secret="chat", default=True)
    world.fire(CAUSE)
    world.work()

    (sent,) = world.notifications()
    assert (sent.state, sent.error) == ("sent", "")
    (document,) = receiver.documents()
    assert document["title"] == "[CRITICAL] errors-high: error rate 0.2 > 0.05"
    assert document["type"] == "failure"


def test_the_end_of_an_alert_never_arrives_before_its_beginning(world: AlertWorld, receiver: Received) -> None:
    world.channel("ops", kind="webhook", url=receiver.url, default=True)
    receiver.statuses += [503]
    world.fire(CAUSE)
    world.work()
    world.clear(CAUSE)
    world.work()
    world.pass_time("1 hour")
    for _ in range(2):
        world.work()

    types = [json.loads(body)["type"] for _, body in receiver.requests]
    assert types[-2:] == ["alert.firing", "alert.resolved"]
    assert types.count("alert.resolved") == 1
