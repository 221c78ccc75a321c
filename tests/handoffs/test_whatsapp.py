"""WhatsApp leads to CRMs: Meta's web hooks, chains of hand-offs, upserts as HubSpot and Twenty want them, replies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from app.handoffs import check
from app.handoffs.connectors.connector import NotGenuine, ReceivedRequest
from app.handoffs.connectors.whatsapp import WhatsAppSource
from app.kernel import clock
from app.kernel.errors import InvalidInput
from app.kernel.sections.http import HttpSettings
from tests.handoffs.conftest import HandoffWorld
from tests.handoffs.peers import META_SECRETS, Peers, event, serving, signed, text_message

APP_SECRET, VERIFY = META_SECRETS.values()
PATH = "/v1/hooks/default/whatsapp-leads"
LEADS = """
handoff: whatsapp-leads
source: {{kind: whatsapp, app_secret: meta_app, verify_token: meta_verify}}
schema: {{type: object, required: [from, text], properties: {{from: {{type: string}}, text: {{type: string}}}}}}
mapping:
  cel: >-
    {{"phone": message.from, "first_name": message.name,
      "email": message.text.substring(message.text.lastIndexOf(" ") + 1)}}
  schema:
    type: object
    required: [phone, email]
    properties: {{phone: {{type: string, format: e164}}, email: {{type: string, format: email}}}}
target:
  kind: hubspot
  url: "{url}"
  token: crm
  fields: {{email: email, work_email: email, phone: phone, firstname: first_name, lifecyclestage: stage}}
retry: {{max_attempts: 30, delay: 0s}}
expected: [email, phone, first_name]
then:
  - {{handoff: contacts, cel: '{{"phone": payload.phone, "email": payload.email, "name": payload.first_name}}'}}
  - handoff: replies
    when: payload.first_name != ""
    cel: '{{"to": payload.phone, "text": "Thank you, " + payload.first_name + "."}}'
"""
CONTACTS = """
handoff: contacts
source: {{kind: api}}
mapping: {{jmespath: message}}
target:
  kind: twenty
  url: "{url}"
  token: crm
  fields: {{name.firstName: name, emails.primaryEmail: email, phones.primaryPhoneNumber: phone, jobTitle: job}}
retry: {{max_attempts: 30, delay: 0s}}
"""
REPLIES = """
handoff: replies
source: {{kind: api}}
mapping: {{jmespath: message}}
target: {{kind: whatsapp, url: "{url}/v23.0", phone_number_id: "1065", token: crm, text: text}}
retry: {{max_attempts: 30, delay: 0s}}
"""


@pytest.fixture
def others(world: HandoffWorld) -> Iterator[Peers]:
    with serving(Peers()) as made:
        world.runtime.settings = world.runtime.settings.model_copy(
            update={"http": HttpSettings(allowed_hosts=(made.url.removeprefix("http://"),), allow_private=True)}
        )
        folder = world.runtime.settings.secrets_dir
        for name, value in META_SECRETS.items():
            (folder / name).write_text(value)
            (folder / name).chmod(0o600)
        yield made


def put_all(world: HandoffWorld, url: str) -> None:
    for document in (CONTACTS, REPLIES, LEADS):
        world.put(document.format(url=url))


def test_leads_reach_two_crms_once_and_get_a_reply(world: HandoffWorld, others: Peers) -> None:
    """Each request comes five times and out of order, a third of deliveries fails; one sender says stop."""
    put_all(world, others.url)
    others.failing = 0.3
    people = [(f"wamid.{n}", f"346001234{n:02d}", f"p{n}@example.com") for n in range(12)]
    requests = [event(text_message(id_, sender, f"Hello, mail {email}")) for id_, sender, email in people]
    requests.append(event(text_message("wamid.bad", "34600123499", "Call me, mail nobody")))
    world.client.post(PATH, **signed(event(text_message("wamid.stop", "34600123403", "STOP"))))
    deliveries = requests * 5
    random.Random(2).shuffle(deliveries)
    for n, body in enumerate(deliveries):
        assert world.client.post(PATH, **signed(body)).status_code == 202
        if n == 30:
            world.work()
    world.work()

    emails = {email for _, _, email in people}
    assert set(others.hubspot) == set(others.twenty) == emails
    assert others.hubspot["p1@example.com"] == {
        "email": "p1@example.com",
        "work_email": "p1@example.com",
        "phone": "+34600123401",
        "firstname": "Ana",
    }
    assert others.twenty["p1@example.com"] == {
        "name": {"firstName": "Ana"},
        "emails": {"primaryEmail": "p1@example.com"},
        "phones": {"primaryPhoneNumber": "+34600123401"},
    }
    assert sorted(reply["to"] for reply in others.replies) == sorted(
        f"+{s}" for _, s, _ in people if not s.endswith("03")
    )
    assert others.replies[0]["text"] == {"preview_url": False, "body": "Thank you, Ana."}
    (refused,) = world.messages("replies", state="skipped")
    assert refused["sender"] == "+34600123403"
    (invalid,) = world.messages("whatsapp-leads", state="invalid")
    (problem,) = invalid["problems"]
    assert (problem["where"], problem["accepted"]) == ("payload.email", "an address such as ana@example.com")
    scores = world.client.get("/v1/handoffs/whatsapp-leads/scores").json()["total"]
    assert scores["duplicates"] == 13 * 4
    assert scores["success"] == pytest.approx(12 / 13)
    assert world.client.get("/v1/handoffs/contacts/scores").json()["total"]["accuracy"] == 1

    world.client.post(PATH, **signed(event(text_message("wamid.start", "34600123403", "Start!"))))
    again = event(text_message("wamid.again", "34600123403", "mail p3@example.com"))
    world.client.post(PATH, **signed(again))
    world.work()
    assert others.replies[-1]["to"] == "+34600123403"


def test_who_may_send_and_who_owns_the_address(world: HandoffWorld, others: Peers) -> None:
    put_all(world, others.url)
    asked = {"hub.mode": "subscribe", "hub.verify_token": VERIFY, "hub.challenge": "1158201444"}
    assert world.client.get(PATH, params=asked).text == "1158201444"
    for wrong in ({"hub.verify_token": "guess"}, {"hub.mode": "unsubscribe"}):
        assert world.client.get(PATH, params={**asked, **wrong}).status_code == 401
    right = signed(event(text_message("wamid.1", "34600123401", "mail a@b.com")))
    forged = signed(event(text_message("wamid.1", "34600123401", "mail a@b.com")), "another-secret")
    assert world.client.post(PATH, **forged).status_code == 401
    for value in ("", "sha256=", "sha1=" + "0" * 40, "sha256=" + "G" * 64):
        headers = {**right["headers"], "x-hub-signature-256": value}
        assert world.client.post(PATH, content=right["content"], headers=headers).status_code == 401
    assert world.client.post(PATH, **signed({"object": "page", "entry": []})).status_code == 422
    assert world.messages("whatsapp-leads") == []
    assert world.client.post(PATH, **right).status_code == 202


def test_a_chain_that_cannot_go_on_is_seen_and_repeated(world: HandoffWorld, others: Peers) -> None:
    put_all(world, others.url)
    assert world.client.delete("/v1/handoffs/contacts").status_code == 204
    world.client.post(PATH, **signed(event(text_message("wamid.1", "34600123401", "mail a@example.com"))))
    world.work()
    (failed,) = world.messages("whatsapp-leads", state="failed")
    assert "contacts" in failed["problems"][0]["message"]
    assert others.replies == []

    world.put(CONTACTS.format(url=others.url))
    assert world.client.post(f"/v1/handoffs/whatsapp-leads/messages/{failed['id']}/replay").status_code == 202
    world.work()
    assert (len(others.hubspot), len(others.twenty), len(others.replies)) == (1, 1, 1)


#: Messages in the shapes of Meta's documentation, and what is read of them.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "image": (
        {"image": {"caption": "The kitchen", "mime_type": "image/jpeg", "sha256": "abc=", "id": "24230790383178626"}},
        {"text": "The kitchen", "media": {"id": "24230790383178626", "mime_type": "image/jpeg", "sha256": "abc="}},
    ),
    "document": (
        {"document": {"filename": "lease.pdf", "mime_type": "application/pdf", "id": "7"}},
        {"text": "", "media": {"id": "7", "mime_type": "application/pdf", "filename": "lease.pdf"}},
    ),
    "interactive": (
        {"interactive": {"type": "list_reply", "list_reply": {"id": "visit", "title": "A visit", "description": "x"}}},
        {"text": "A visit", "choice": "visit"},
    ),
    "button": ({"button": {"payload": "yes", "text": "Yes, please"}}, {"text": "Yes, please", "choice": "yes"}),
    "location": (
        {"location": {"latitude": 40.4, "longitude": -3.7, "name": "Sol", "address": "Madrid"}},
        {"text": "Sol Madrid", "location": {"latitude": 40.4, "longitude": -3.7}},
    ),
    "contacts": (
        {
            "contacts": [
                {"name": {"formatted_name": "Bo Li"}, "phones": [{"phone": "+1 650"}], "emails": [{"email": "b@x.org"}]}
            ]
        },
        {"text": "Bo Li", "contacts": [{"name": "Bo Li", "phones": ["+1 650"], "emails": ["b@x.org"]}]},
    ),
}
SOURCE = WhatsAppSource(kind="whatsapp", app_secret="meta_app", verify_token="meta_verify")


def received(body: Any, source: WhatsAppSource = SOURCE) -> Any:
    request = signed(body)
    return source.receive(ReceivedRequest(request["headers"], request["content"]), lambda _: APP_SECRET, clock.now())


@pytest.mark.parametrize("kind", SHAPES)
def test_kinds_of_messages_are_read(kind: str) -> None:
    given, expected = SHAPES[kind]
    base = {"from": "34600123401", "id": "wamid.1", "timestamp": "1767225600", "type": kind}
    (found,) = received(event({**base, **given}))
    assert found.skipped == ""
    assert expected.items() <= found.message.items()
    assert found.message["at"] == "2026-01-01T00:00:00+00:00"


def test_statuses_are_recorded_once_each_and_nothing_strange_is_an_error() -> None:
    sent = {"id": "wamid.r", "status": "sent", "timestamp": "1767225600", "recipient_id": "34600123401"}
    found = received(event(statuses=(sent, {**sent, "status": "read"}, sent)))
    assert [one.key for one in found] == ["wamid.r:sent", "wamid.r:read", "wamid.r:sent"]
    assert all(one.skipped for one in found)

    base = {"from": "34600123401", "id": "wamid.1", "timestamp": "x" * 30, "type": "reaction"}
    (reaction,) = received(event(base))
    assert "reaction" in reaction.skipped
    strange: list[Any] = [None, 7, "x", [], {}, {"from": 7}, {"id": None}, {"from": "34600123401", "id": "y" * 600}]
    for one in strange:
        body = event(text_message("wamid.1", "34600123401", "Hi."))
        body["entry"][0]["changes"][0]["value"]["messages"].append(one)
        assert len(received(body)) == 1
    for broken in (
        {"entry": 7},
        {"entry": [7]},
        {"entry": [{"changes": "x"}]},
        {"entry": [{"changes": [{"field": 1}]}]},
    ):
        assert received({"object": "whatsapp_business_account", **broken}) == []
    with pytest.raises(InvalidInput, match="at most 1000"):
        received(event(*(text_message(f"wamid.{n}", "34600123401", "Hi.") for n in range(1_001))))
    other = SOURCE.model_copy(update={"phone_number_id": "999"})
    assert received(event(text_message("wamid.1", "34600123401", "Hi.")), other) == []
    with pytest.raises(NotGenuine):
        SOURCE.receive(ReceivedRequest({}, b"{}"), lambda _: APP_SECRET, clock.now())


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (("token: crm\n  fields: {{email", "token: crm\n  fields: {{mail"), "target"),
        (('\'{{"phone": payload.phone,', '\'{{"phone": nothing.phone,'), "then[0].cel"),
        (("when: payload.first_name", "when: nothing"), "then[1].when"),
        (("lifecyclestage: stage", "name: email, name.first: first_name"), "target"),
        (('url: "{url}"', 'url: "{url}/{{{{ secrets.crm }}}}"'), "target.url"),
    ],
)
def test_mistakes_are_found_before_a_message_comes(change: tuple[str, str], where: str) -> None:
    assert change[0] in LEADS
    with pytest.raises(InvalidInput) as refused:
        check.parse(LEADS.replace(*change).format(url="http://127.0.0.1:1"))
    assert any(problem.where.startswith(where) for problem in refused.value.problems), refused.value.problems
