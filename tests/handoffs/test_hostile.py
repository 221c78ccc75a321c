"""What a genuine sender may write by mistake, or somebody through it: nothing stops a pass, and nothing is dropped."""

from __future__ import annotations

from typing import Any

import pytest

from app.handoffs import advance
from tests.handoffs.conftest import Crm, HandoffWorld
from tests.handoffs.test_webhooks import DOCUMENT, PATH, signed

#: Texts that Postgres, a log or a header cannot have as they are.
STRANGE = ["a\x00b", "\x00", "a\r\nx: y\u202e\x1b[31m", "a" * 5_000, "{{ secrets.crm }}", "{% raw %}' OR 1=1--"]


def keyed(source: str, crm: Crm) -> str:
    """The hand-off with another source, without its tests."""
    text = DOCUMENT.format(url=crm.url).partition("tests:")[0]
    return text.replace("{kind: webhook, secret: shop_hook, sender: message.shop}", source)


@pytest.mark.parametrize("strange", STRANGE)
def test_strange_texts_are_kept_with_their_message_and_hold_no_other_up(
    world: HandoffWorld, crm: Crm, strange: str
) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    strangers: list[dict[str, Any]] = [
        {"id": 1, "shop": strange, "email": "a@b.com"},
        {"id": 2, "shop": "s", "email": strange},
        {"id": 3, "shop": "s", "email": "c@d.com", "name": strange},
        {"id": 4, "shop": "s", "email": "c@d.com", strange: strange},
    ]
    for message in [*strangers, {"id": 9, "shop": "s", "email": "z@example.com"}]:
        answer = world.client.post(PATH, **signed(message, f"msg_{message['id']}"))
        assert answer.status_code == 202, answer.text
    world.work()

    states = {one["key"]: one["state"] for one in world.messages("new-leads")}
    assert set(states) == {"msg_1", "msg_2", "msg_3", "msg_4", "msg_9"}
    assert set(states.values()) <= {"delivered", "invalid", "failed"}
    assert states["msg_9"] == "delivered"
    assert states["msg_2"] == "invalid"
    assert "token" not in str(crm.leads())
    for one in world.messages("new-leads"):
        assert world.client.get(f"/v1/handoffs/new-leads/messages/{one['id']}").status_code == 200
    assert world.client.get("/v1/handoffs/new-leads/scores").status_code == 200


@pytest.mark.parametrize("shop", [None, 7.5, [], ""])
def test_a_genuine_message_whose_sender_is_unknown_is_kept_and_can_be_mended(
    world: HandoffWorld, crm: Crm, shop: Any
) -> None:
    world.put(DOCUMENT.format(url=crm.url).replace("required: [id, shop, email]\n  properties", "properties"))
    message = {"id": 1, "email": "a@b.com"} | ({} if shop is None else {"shop": shop})
    for _ in range(3):
        assert world.client.post(PATH, **signed(message, "msg_1")).status_code == 202
    world.work()

    (kept,) = world.messages("new-leads")
    assert (kept["state"], kept["duplicates"], kept["sender"]) == ("invalid", 2, "")
    assert kept["problems"]
    path = f"/v1/handoffs/new-leads/messages/{kept['id']}/mend"
    assert world.client.post(path, json={"message": message}).status_code == 422
    assert world.client.post(path, json={"message": {**message, "shop": "s"}}).status_code == 202
    world.work()
    assert [lead["id"] for lead in crm.leads()] == [1]


@pytest.mark.parametrize("key", ["", "x" * 501, "a\x00b", {}])
def test_a_genuine_message_without_a_key_is_known_by_that_of_the_protocol(
    world: HandoffWorld, crm: Crm, key: Any
) -> None:
    world.put(keyed("{kind: webhook, secret: shop_hook, key: message.order}", crm))
    message = {"id": 1, "shop": "s", "email": "a@b.com", "order": key}
    for id_ in ("msg_1", "msg_1", "msg_2"):
        assert world.client.post(PATH, **signed(message, id_)).status_code == 202
    world.work()

    kept = world.messages("new-leads", state="invalid")
    assert sorted((one["key"], one["duplicates"]) for one in kept) == [("msg_1", 1), ("msg_2", 0)]
    assert "source.key" in str(kept[0]["problems"])


def test_a_message_that_cannot_be_confirmed_is_shown_and_holds_no_other_up(
    world: HandoffWorld, crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    for n in range(4):
        world.client.post(PATH, **signed({"id": n, "shop": "s", "email": "a@b.com"}, f"msg_{n}"))
    genuine = advance.following.pass_on

    def pass_on(work: Any, handoff: Any, message: Any, output: Any) -> None:
        if message.key == "msg_1":
            raise ZeroDivisionError
        genuine(work, handoff, message, output)

    monkeypatch.setattr(advance.following, "pass_on", pass_on)
    world.work()

    assert {one["key"]: one["state"] for one in world.messages("new-leads")} == {
        **{f"msg_{n}": "delivered" for n in (0, 2, 3)},
        "msg_1": "failed",
    }
    monkeypatch.setattr(advance.following, "pass_on", genuine)
    (failed,) = world.messages("new-leads", state="failed")
    assert world.client.post(f"/v1/handoffs/new-leads/messages/{failed['id']}/replay").status_code == 202
    world.work()
    assert len(world.messages("new-leads", state="delivered")) == 4
    assert len(crm.leads()) == 4


def test_who_calls_with_a_key_hears_at_once_that_a_message_cannot_be_identified(world: HandoffWorld, crm: Crm) -> None:
    world.put(keyed("{kind: api, key: message.order}", crm))
    answer = world.client.post("/v1/handoffs/new-leads/messages", json={"id": 1, "shop": "s", "email": "a@b.com"})

    assert answer.status_code == 422
    assert "source.key" in answer.text
    assert world.messages("new-leads") == []
