"""The shipped chain of hand-offs, live: WhatsApp → lead qualification by a real model → CRM → reply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.handoffs.peers import META_SECRETS, TOKEN, Peers, event, serving, signed, text_message
from tests.live.conftest import ROOT, Live, running, until

EXAMPLES = ROOT / "examples" / "handoffs"
#: A buyer with money, and a deadline; the last sentence is for the model.
STRONG = (
    "Hello, good morning! Our budget is 420,000. The bank has already approved our mortgage. "
    "We have to move within the next month. Can we come and see the house on Friday? My aunt used to live in that road."
)
WEAK = "Hello! I am only looking around, nothing serious. We do not plan to buy before next year."
ANA, BEN = "34600123456", "34600123457"
#: Where each shipped target calls; the peers are given instead.
TARGETS = {"  token: hubspot_token": "  url: {url}", "  token: whatsapp_token": "  url: {url}/v23.0"}


@pytest.fixture
def peers() -> Iterator[Peers]:
    with serving(Peers(id_property="phone_key")) as made:
        yield made


@pytest.fixture
def tree(tmp_path: Path, peers: Peers) -> Iterator[Live]:
    folder = tmp_path / "secrets"
    folder.mkdir(mode=0o700)
    for name, value in {**META_SECRETS, "hubspot_token": TOKEN, "whatsapp_token": TOKEN}.items():
        (folder / name).write_text(value)
        (folder / name).chmod(0o600)
    data = tmp_path / "data"
    data.mkdir(mode=0o711)
    allowed = json.dumps([peers.url.removeprefix("http://")])
    options = (f"--set=http.allowed_hosts={allowed}", "--set=http.allow_private=true", f"--set=secrets_dir={folder}")
    with running(data, *options) as found:
        yield found


@pytest.mark.slow
@pytest.mark.storm
@pytest.mark.timeout(600)
def test_a_lead_on_whatsapp_becomes_one_contact_and_gets_one_reply(tree: Live, peers: Peers, tmp_path: Path) -> None:
    tree.arriero("models", "pull", "gemma3:270m")
    for name in ("crm-contacts", "whatsapp-replies", "whatsapp-leads"):
        document = (EXAMPLES / f"{name}.yaml").read_text()
        for line, added in TARGETS.items():
            document = document.replace(line, f"{line}\n{added.format(url=peers.url)}")
        file = tmp_path / f"{name}.yaml"
        file.write_text(document)
        tree.arriero("handoffs", "put", str(file))

    def send(id_: str, sender: str, text: str, name: str) -> None:
        request = signed(event(text_message(id_, sender, text), name=name))
        answer = httpx2.post(f"{tree.api}/v1/hooks/default/whatsapp-leads", timeout=60, **request)
        assert answer.status_code == 202, answer.text

    for _ in range(3):
        send("wamid.1", ANA, STRONG, "Ana")
    send("wamid.2", BEN, WEAK, "Ben")
    send("wamid.3", BEN, "STOP", "Ben")
    leads = {one["sender"]: one for one in delivered(tree, "whatsapp-leads", 2)}
    contacts = {one["payload"]["phone"]: one["payload"] for one in delivered(tree, "crm-contacts", 2)}
    (reply,) = delivered(tree, "whatsapp-replies", 1)

    assert set(peers.hubspot) == {f"+{ANA}", f"+{BEN}"} == set(contacts)
    for sender, payload in contacts.items():
        output = tree.run(leads[sender]["run_id"])["output"]
        assert payload["grade"] == output["grade"] == peers.hubspot[sender]["lead_grade"]
        assert peers.hubspot[sender]["lead_score"] == payload["score"]
    assert contacts[f"+{ANA}"]["grade"] in "AB"
    assert contacts[f"+{BEN}"]["grade"] not in "AB"
    assert [one["to"] for one in peers.replies] == [f"+{ANA}"] == [reply["payload"]["to"]]
    assert peers.replies[0]["template"]["name"] == "viewing_offer"
    scores = httpx2.get(f"{tree.api}/v1/handoffs/whatsapp-leads/scores", timeout=60).json()["total"]
    assert (scores["duplicates"], scores["success"]) == (2, 1)

    send("wamid.4", BEN, STRONG, "Ben")
    (refused,) = until(lambda: messages(tree, "whatsapp-replies", "skipped"))
    assert refused["sender"] == f"+{BEN}", "who has opted out gets no reply"
    assert len(peers.replies) == 1


def delivered(tree: Live, name: str, count: int) -> list[dict[str, Any]]:
    """The messages of a hand-off with their payloads, once so many are delivered."""
    found = until(lambda: found if len(found := messages(tree, name, "delivered")) >= count else None)
    return [httpx2.get(f"{tree.api}/v1/handoffs/{name}/messages/{one['id']}", timeout=60).json() for one in found]


def messages(tree: Live, name: str, state: str) -> list[dict[str, Any]]:
    answer = httpx2.get(f"{tree.api}/v1/handoffs/{name}/messages", params={"state": state}, timeout=60)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["messages"]
    return found
