"""The pages of hand-offs: what is to be mended, and why."""

from __future__ import annotations

from typing import Any

from tests.handoffs.conftest import Crm, HandoffWorld
from tests.handoffs.test_webhooks import DOCUMENT, PATH, signed

HTML = {"Accept": "text/html"}


def page(world: HandoffWorld, path: str, **query: Any) -> str:
    answer = world.client.get(path, params=query, headers=HTML)
    assert answer.status_code == 200, answer.text[:1000]
    return answer.text


def test_what_is_to_be_mended_is_found_in_three_clicks(world: HandoffWorld, crm: Crm) -> None:
    world.put(DOCUMENT.format(url=crm.url))
    for n, email in enumerate(("a@b.com", "<script>alert(1)</script>")):
        world.client.post(PATH, **signed({"id": n, "shop": f"shop <{n}>", "email": email}, f"msg_{n}"))
    world.work()

    listed = page(world, "/ui/handoffs")
    assert "new-leads" in listed
    assert "state=invalid" in listed
    one = page(world, "/ui/handoffs/new-leads", state="invalid")
    assert "payload.email" in one
    assert "shop &lt;1&gt;" in one
    (invalid,) = world.messages("new-leads", state="invalid")
    message = page(world, f"/ui/handoffs/new-leads/messages/{invalid['id']}")
    assert "Mend and send" in message
    assert "<script>alert" not in message
    (delivered,) = world.messages("new-leads", state="delivered")
    assert delivered["run_id"] in page(world, f"/ui/handoffs/new-leads/messages/{delivered['id']}")
    for wrong in ("/ui/handoffs/nothing", f"/ui/handoffs/new-leads/messages/{'0' * 32}"):
        assert world.client.get(wrong, headers=HTML).status_code == 404
