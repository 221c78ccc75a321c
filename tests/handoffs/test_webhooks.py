"""Web hooks to a CRM: authenticated, de-duplicated, mapped, delivered over failures, scored; none lost or doubled."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text
from standardwebhooks import Webhook

from app.governance.signals import store as signals
from app.governance.signals.store import SignalQuery
from app.handoffs import advance, store
from tests.handoffs.conftest import SECRETS, Crm, HandoffWorld

DOCUMENT = """
handoff: new-leads
source: {{kind: webhook, secret: shop_hook, sender: message.shop}}
schema:
  type: object
  required: [id, shop, email]
  properties: {{id: {{type: integer}}, shop: {{type: string}}, email: {{type: string}}}}
mapping:
  cel: '{{"id": message.id, "email": message.email.lowerAscii(), "name": message.?name.orValue("")}}'
  schema:
    type: object
    required: [id, email]
    properties: {{email: {{type: string, format: email}}}}
target:
  kind: http
  url: "{url}/leads"
  headers: {{authorization: "Bearer {{{{ secrets.crm }}}}"}}
  read_back: {{url: "{url}/leads/{{{{ steps.deliver.output.body.id }}}}"}}
retry: {{max_attempts: 20, delay: 0s}}
expected: [id, email, name]
tests:
  - {{name: plain, message: {{id: 1, shop: s, email: A@b.com}}, payload: {{id: 1, email: a@b.com, name: ""}}}}
  - {{name: no address, message: {{id: 1, shop: s, email: nobody}}, invalid: true}}
"""
PATH = "/v1/hooks/default/new-leads"


def signed(message: Any, id_: str, at: datetime | None = None, secret: str = SECRETS["shop_hook"]) -> dict[str, Any]:
    """Return the arguments of a request, signed by another implementation of the standard."""
    body, at = json.dumps(message), at or datetime.now(UTC)
    headers = {"webhook-id": id_, "webhook-timestamp": str(int(at.timestamp()))}
    headers["webhook-signature"] = Webhook(secret).sign(id_, at, body)
    return {"content": body, "headers": {**headers, "content-type": "application/json"}}


def test_every_message_arrives_once_although_each_comes_five_times_and_the_target_fails(
    world: HandoffWorld, crm: Crm
) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    truth = random.Random(3)
    messages = [
        {"id": n, "shop": f"shop-{n % 3}", "email": f"P{n}@example.com" if n % 8 else "nobody"}
        | ({"name": f"Person {n}"} if n % 2 else {})
        for n in range(40)
    ]
    crm.failing = 0.3
    deliveries = [one for one in messages for _ in range(5)]
    truth.shuffle(deliveries)
    for n, message in enumerate(deliveries):
        answer = world.client.post(PATH, **signed(message, f"msg_{message['id']}"))
        assert answer.status_code == 202, answer.text
        if n == 100:  # while others still come
            world.work()
    world.work()

    invalid = {one["id"] for one in messages if one["email"] == "nobody"}
    assert {lead["id"] for lead in crm.leads()} == {one["id"] for one in messages} - invalid
    assert len(crm.leads()) == 35
    states = [one["state"] for one in world.messages("new-leads")]
    assert (states.count("delivered"), states.count("invalid"), len(states)) == (35, 5, 40)
    scores = world.client.get("/v1/handoffs/new-leads/scores").json()
    assert (scores["total"]["messages"], scores["total"]["duplicates"]) == (40, 160)
    assert scores["total"]["success"] == pytest.approx(35 / 40)
    assert sum(one["messages"] for one in scores["senders"]) == 40
    # Delivered ones agree with the CRM; of the three fields of a refused payload one is wrong, and none was complete.
    assert scores["total"]["accuracy"] == pytest.approx((35 + 5 * 2 / 3) / 40)
    named = sum("name" in one for one in messages if one["id"] not in invalid)
    assert scores["total"]["completeness"] == pytest.approx((named + (35 - named) * 2 / 3) / 40)
    assert scores["total"]["timeliness"] == 1
    with world.database.work() as work:
        found = signals.read(work, SignalQuery("handoff_success", timedelta(minutes=5)))[""]
    assert (found.total, found.weight) == (35, 40)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"secret": "whsec_" + "A" * 40}, "no signature"),
        ({"at": datetime.now(UTC) - timedelta(minutes=6)}, "more than 300 s"),
        ({"at": datetime.now(UTC) + timedelta(hours=1)}, "more than 300 s"),
    ],
)
def test_what_is_not_signed_now_by_the_sender_is_refused(
    world: HandoffWorld, crm: Crm, change: dict[str, Any], says: str
) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    answer = world.client.post(PATH, **signed({"id": 1, "shop": "s", "email": "a@b.com"}, "msg_1", **change))

    assert answer.status_code == 401
    assert says in answer.json()["detail"]
    assert world.messages("new-leads") == []


def test_a_changed_body_or_a_missing_header_is_refused(world: HandoffWorld, crm: Crm) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    request = signed({"id": 1, "shop": "s", "email": "a@b.com"}, "msg_1")

    assert world.client.post(PATH, **{**request, "content": request["content"] + " "}).status_code == 401
    for name in ("webhook-id", "webhook-timestamp", "webhook-signature"):
        headers = {key: value for key, value in request["headers"].items() if key != name}
        assert world.client.post(PATH, content=request["content"], headers=headers).status_code == 401
    forged = {**request["headers"], "webhook-signature": b"v1,\xe9 v1, " + b"v1,AAAA " * 1000}
    assert world.client.post(PATH, content=request["content"], headers=forged).status_code in (401, 422, 431)
    assert world.client.post(PATH, **request).status_code == 202


def test_a_body_that_is_too_long_or_no_object_is_refused(world: HandoffWorld, crm: Crm) -> None:
    world.put(DOCUMENT.format(url=crm.url).replace("secret: shop_hook", "secret: shop_hook, max_bytes: 100"))

    assert world.client.post(PATH, **signed({"id": "x" * 200}, "msg_1")).status_code == 413
    assert world.client.post(PATH, **signed([1], "msg_2")).status_code == 422
    assert world.messages("new-leads") == []


def test_an_invalid_message_is_mended_and_a_failed_one_replayed(world: HandoffWorld, crm: Crm) -> None:
    world.put(DOCUMENT.format(url=crm.url).replace("max_attempts: 20", "max_attempts: 1"))
    world.client.post(PATH, **signed({"id": 1, "shop": "s", "email": "nobody"}, "msg_1"))
    crm.failing = 1.0
    world.client.post(PATH, **signed({"id": 2, "shop": "s", "email": "b@example.com"}, "msg_2"))
    world.work()

    (invalid,) = world.messages("new-leads", state="invalid")
    assert invalid["problems"][0]["where"] == "payload.email"
    (failed,) = world.messages("new-leads", state="failed")
    assert "503" in failed["problems"][0]["message"]
    crm.failing = 0.0
    path = f"/v1/handoffs/new-leads/messages/{invalid['id']}/mend"
    still = world.client.post(path, json={"message": {"id": 1, "shop": "s", "email": "still nobody"}})
    assert still.status_code == 422
    assert world.client.post(path, json={"message": {"id": 1, "shop": "s", "email": "a@b.com"}}).status_code == 202
    assert world.client.post(path, json={"message": {"id": 1, "shop": "s", "email": "a@b.com"}}).status_code == 409
    replay = f"/v1/handoffs/new-leads/messages/{failed['id']}/replay"
    assert world.client.post(replay).status_code == 202
    world.work()

    assert [one["state"] for one in world.messages("new-leads")] == ["delivered", "delivered"]
    assert {lead["email"] for lead in crm.leads()} == {"a@b.com", "b@example.com"}
    shown = world.client.get(f"/v1/handoffs/new-leads/messages/{invalid['id']}").json()
    stages = [stage["stage"] for stage in shown["stages"]]
    assert stages == ["authenticate", "validate", "resend", "transform", "confirm"]
    assert "mended by" in shown["stages"][2]["detail"]


def test_a_worker_that_dies_after_the_submission_submits_nothing_twice(
    world: HandoffWorld, crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    world.client.post(PATH, **signed({"id": 1, "shop": "s", "email": "a@b.com"}, "msg_1"))
    with monkeypatch.context() as patch:
        patch.setattr(advance, "_record", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            advance.advance(world.runtime.runs, lambda: True)
    world.work()
    assert len(crm.leads()) == 1, "its run goes on"
    assert world.messages("new-leads")[0]["state"] == "received", "another worker may take it after the lease"

    world.run("UPDATE handoff_message SET due_at = now()")
    world.work()
    assert world.messages("new-leads")[0]["state"] == "delivered"
    with world.database.work() as work:
        assert work.rows(text("SELECT count(*) AS runs FROM run"))[0].runs == 1


def test_a_message_that_no_worker_survives_fails_and_holds_no_other_up(
    world: HandoffWorld, crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    for n in (1, 2):
        world.client.post(PATH, **signed({"id": n, "shop": "s", "email": "a@b.com"}, f"msg_{n}"))
    genuine = advance._sent

    def sent(runs: Any, known: Any, message: Any) -> Any:
        if message.key == "msg_1":
            raise ZeroDivisionError
        return genuine(runs, known, message)

    monkeypatch.setattr(advance, "_sent", sent)
    for _ in range(advance.MAX_TAKES):
        world.work()
        world.run("UPDATE handoff_message SET due_at = now() WHERE state = 'received'")

    assert [one["state"] for one in world.messages("new-leads")] == ["delivered", "failed"]


def test_a_late_worker_changes_nothing(world: HandoffWorld, crm: Crm) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    world.client.post(PATH, **signed({"id": 1, "shop": "s", "email": "a@b.com"}, "msg_1"))
    with world.database.work() as work:
        (late,) = store.take(work, timedelta(0), 10)
    world.work()
    advance._record(world.database, late, advance._failed("late"))

    assert world.messages("new-leads")[0]["state"] == "delivered"


def test_messages_of_a_hand_off_that_was_deleted_are_kept(world: HandoffWorld, crm: Crm) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    world.client.post(PATH, **signed({"id": 1, "shop": "s", "email": "a@b.com"}, "msg_1"))
    assert world.client.delete("/v1/handoffs/new-leads").status_code == 204
    world.work()
    assert world.client.post(PATH, **signed({"id": 2, "shop": "s", "email": "a@b.com"}, "msg_2")).status_code == 404
    world.put(DOCUMENT.format(url=crm.url))

    (failed,) = world.messages("new-leads")
    assert (failed["state"], crm.leads()) == ("failed", [])
    assert world.client.post(f"/v1/handoffs/new-leads/messages/{failed['id']}/replay").status_code == 202
    world.work()
    assert len(crm.leads()) == 1


def test_no_secret_is_in_the_record_or_the_run(world: HandoffWorld, crm: Crm) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    world.client.post(PATH, **signed({"id": 1, "shop": "s", "email": "a@b.com"}, "msg_1"))
    world.work()

    assert crm.headers[0]["authorization"] == f"Bearer {SECRETS['crm']}"
    (message,) = world.messages("new-leads")
    run = world.client.get(f"/v1/runs/{message['run_id']}").text
    record = world.client.get(f"/v1/handoffs/new-leads/messages/{message['id']}").text
    assert SECRETS["crm"] not in run + record
