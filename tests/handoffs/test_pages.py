"""The pages of hand-offs: what is to be mended, and why."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from app.handoffs.connectors.email import ImapMailbox
from app.handoffs.mail import mailboxes
from app.kernel.sections.mail import MailSettings
from tests.handoffs.conftest import Crm, HandoffWorld
from tests.handoffs.test_mail import WORKFLOW, put_workflow
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


BOX = """
handoff: box
source: {kind: email, imap: {host: imap.example.com, user: ana, password: mailbox}}
mapping: {cel: "{'subject': message.subject}"}
target: {kind: workflow, workflow: sort-mail}
"""


def test_the_page_says_what_a_mailbox_waits_for(world: HandoffWorld) -> None:
    """Before and after a failure; no hand-off without a mailbox has the section."""
    put_workflow(world, WORKFLOW, "sort-mail")
    world.put(BOX)
    nothing = world.client.get("/v1/handoffs/box/scores").json()["total"]
    assert (nothing["messages"], nothing["duplicates"]) == (0, 0)
    assert "box" in page(world, "/ui/handoffs")
    expected = "the setting mail.imap_hosts to list imap.example.com:993"
    assert f"It waits for {expected}." in page(world, "/ui/handoffs/box")
    assert world.client.get("/v1/handoffs/box/mailbox").json()["waits_for"] == expected

    services = world.client.app.state.services  # type: ignore[attr-defined]  # of Starlette
    listed = MailSettings(imap_hosts=("imap.example.com",))
    services.settings = services.settings.model_copy(update={"mail": listed})
    assert "It waits for a control worker that watches it." in page(world, "/ui/handoffs/box")
    mailbox = ImapMailbox(host="imap.example.com", user="ana", password="mailbox")
    with world.database.work() as work:
        mailboxes.claim(work, "default", "box", mailboxes.place_of(mailbox), "w", timedelta(minutes=1))
    assert "It waits for an answer of the server." in page(world, "/ui/handoffs/box")
    with world.database.work() as work:
        mailboxes.release(work, "default", "box", "w", "LoginError: <no>", timedelta(minutes=5))
    failed = page(world, "/ui/handoffs/box")
    assert "It waits for the next try." in failed
    assert "LoginError: &lt;no&gt;" in failed
    shown = world.client.get("/v1/handoffs/box/mailbox").json()
    until = datetime.fromisoformat(shown["next_try_at"]) - datetime.now(UTC)
    assert timedelta(minutes=4) < until < timedelta(minutes=6)
    assert (shown["is_connected"], shown["error"]) == (False, "LoginError: <no>")
    assert world.client.get("/v1/handoffs/nothing/mailbox").status_code == 404
