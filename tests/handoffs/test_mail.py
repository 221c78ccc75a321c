"""Mail to workflows: stored once with its attachments and thread, routed, answered once, and never to a machine."""

from __future__ import annotations

import random
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from tests.handoffs.conftest import HandoffWorld

SECRET = "a-secret-of-more-than-24-characters"
PATH = "/v1/hooks/default/mail"

DOCUMENT = """
handoff: mail
source:
  kind: email
  http: {secret: mail}
  proof: {server: mx.example.com}
  reply: {sender: support@arriero.example, text: 'output.answer'}
mapping:
  cel: >-
    {"subject": message.subject, "text": message.text, "thread": message.thread,
    "attachments": message.attachments.map(one, one.text)}
target: {kind: workflow, workflow: sort-mail}
"""
WORKFLOW = """
workflow: sort-mail
inputs: {subject: {type: string}, text: {type: string}, thread: {type: string}, attachments: {type: array}}
steps:
  - {id: answer, kind: transform, cel: '"Thank you for: " + inputs.subject'}
outputs: {answer: steps.answer.output, thread: inputs.thread}
"""


@pytest.fixture
def mailing(world: HandoffWorld, secrets_dir: Path) -> HandoffWorld:
    (secrets_dir / "mail").write_text(SECRET)
    (secrets_dir / "mail").chmod(0o600)
    return world


def put_workflow(world: HandoffWorld, source: str, name: str) -> None:
    answer = world.client.put(f"/v1/workflows/{name}", content=source, headers={"content-type": "application/yaml"})
    assert answer.status_code in (200, 201), answer.text


def post(world: HandoffWorld, raw: bytes, secret: str = SECRET, path: str = PATH) -> Any:
    headers = {"authorization": f"Bearer {secret}", "content-type": "message/rfc822"}
    return world.client.post(path, content=raw, headers=headers)


def mail(n: int = 1, **headers: str) -> EmailMessage:
    message = EmailMessage()
    message["From"] = f"Person {n} <person{n}@example.com>"
    message["To"] = "support@arriero.example"
    message["Subject"] = f"Question {n}"
    message["Date"] = "Mon, 23 Nov 2026 10:00:00 +0000"
    message["Message-ID"] = f"<{n}@example.com>"
    for name, value in headers.items():
        name = name.replace("_", "-")
        del message[name]
        message[name] = value
    message.set_content(f"Where is order {n}?\n")
    return message


def test_each_mail_becomes_one_run_although_it_comes_five_times_and_out_of_order(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    deliveries = [n for n in range(20) for _ in range(5)]
    random.Random(5).shuffle(deliveries)
    for at, n in enumerate(deliveries):
        answer = post(mailing, mail(n).as_bytes())
        assert answer.status_code == 202, answer.text
        if at == 50:  # while others still come
            mailing.work()
    mailing.work()

    found = mailing.messages("mail")
    assert sorted(one["sender"] for one in found) == sorted(f"person{n}@example.com" for n in range(20))
    assert {one["state"] for one in found} == {"delivered"}
    assert sum(one["duplicates"] for one in found) == 80
