"""Mail to workflows: stored once with its attachments and thread, routed, answered once, and never to a machine."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from sqlalchemy import text

from app.files.storage import FileTooLarge
from app.handoffs import check, delivery
from app.handoffs.mail.reading import MailEnvelope
from app.handoffs.service import HandoffService
from app.kernel.errors import InvalidInput
from app.kernel.sections.files import FileSettings
from app.kernel.sections.governance import AlertSettings
from app.workflows.language.steps import GenerateStep
from tests.handoffs.conftest import HandoffWorld
from workers.handoffs.mail import answering, attachment_texts


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def pdf_of(line: str) -> bytes:
    """A PDF with one line of text."""
    content = f"BT /F1 12 Tf 72 720 Td ({line}) Tj ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    found, places = b"%PDF-1.4\n", []
    for n, one in enumerate(objects, start=1):
        places.append(len(found))
        found += f"{n} 0 obj\n{one}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    tail = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n"
    return found + f"{tail}{len(found)}\n%%EOF\n".encode()


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
    deliveries = [n for n in range(12) for _ in range(5)]
    random.Random(5).shuffle(deliveries)
    for at, n in enumerate(deliveries):
        answer = post(mailing, mail(n).as_bytes())
        assert answer.status_code == 202, answer.text
        if at == 30:  # while others still come
            mailing.work()
    mailing.work()

    found = mailing.messages("mail")
    assert sorted(one["sender"] for one in found) == sorted(f"person{n}@example.com" for n in range(12))
    assert {one["state"] for one in found} == {"delivered"}
    assert sum(one["duplicates"] for one in found) == 48


def work(world: HandoffWorld) -> None:
    """As the job does: texts of attachments, then messages, then answers."""
    attachment_texts.read_due(world.runtime, lambda: True)
    world.work()
    answering.send_due(world.runtime, lambda: True)


def full(world: HandoffWorld, found: dict[str, Any], name: str = "mail") -> dict[str, Any]:
    shown: dict[str, Any] = world.client.get(f"/v1/handoffs/{name}/messages/{found['id']}").json()
    return shown


def answering_to(world: HandoffWorld, port: int) -> None:
    alerts = AlertSettings(smtp_host="127.0.0.1", smtp_port=port, smtp_security="none", smtp_from="a@arriero.example")
    world.runtime.settings = world.runtime.settings.model_copy(update={"alerts": alerts})


class Postbox:
    """An SMTP server for what Arriero sends."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.recipients: list[list[str]] = []
        #: Replies to the next mails, instead of taking them.
        self.refusals: list[str] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 aiosmtpd calls it
        del server, session
        if self.refusals:
            return self.refusals.pop(0)
        mail = BytesParser(policy=policy.default).parsebytes(envelope.content)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        self.recipients.append(envelope.rcpt_tos)
        return "250 OK"


@pytest.fixture
def postbox(mailing: HandoffWorld) -> Iterator[Postbox]:
    found = Postbox()
    server = Controller(found, hostname="127.0.0.1", port=free_port())
    server.start()
    answering_to(mailing, server.port)
    yield found
    server.stop()


@pytest.mark.parametrize(("secret", "status"), [("wrong-secret-of-more-than-24", 401), ("", 401), ("é" * 30, 401)])
def test_mail_over_http_needs_the_secret(mailing: HandoffWorld, secret: str, status: int) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)

    headers = {"authorization": f"Bearer {secret}".encode("latin-1"), "content-type": b"message/rfc822"}
    assert mailing.client.post(PATH, content=mail().as_bytes(), headers=headers).status_code == status
    assert mailing.messages("mail") == []


def test_mail_over_http_has_limits(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT.replace("kind: email", "kind: email\n  max_bytes: 2000"))

    assert post(mailing, mail().as_bytes() + b"x" * 3_000).status_code == 413
    assert post(mailing, b"\r\n").status_code == 422
    assert mailing.messages("mail") == []


def test_mail_of_machines_is_stored_as_skipped_and_starts_nothing(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    for n, headers in enumerate(({"Auto_Submitted": "auto-replied"}, {"Precedence": "bulk"}, {"Return_Path": "<>"})):
        assert post(mailing, mail(n, **headers).as_bytes()).status_code == 202
    mailing.work()

    found = mailing.messages("mail")
    assert {one["state"] for one in found} == {"skipped"}
    assert "return path" in full(mailing, found[0])["stages"][0]["detail"]
    assert mailing.client.get("/v1/runs").json()["runs"] == []


def test_attachments_are_files_and_their_texts_reach_the_workflow(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW.replace("inputs.subject'", 'inputs.attachments.join(" | ")\''), "sort-mail")
    mailing.put(DOCUMENT)
    sent = mail()
    sent.add_attachment("plain words", filename="note.txt")
    sent.add_attachment(pdf_of("Invoice 42"), maintype="application", subtype="pdf", filename="invoice.pdf")
    sent.add_attachment(b"%PDF-1.4 broken", maintype="application", subtype="pdf", filename="broken.pdf")
    for _ in range(3):
        assert post(mailing, sent.as_bytes()).status_code == 202
    mailing.work()
    (held,) = mailing.messages("mail")
    assert held["state"] == "received", "it waits for the texts of its PDFs"
    work(mailing)

    (found,) = mailing.messages("mail")
    assert found["state"] == "delivered"
    shown = full(mailing, found)
    output = mailing.client.get(f"/v1/runs/{shown['run_id']}").json()["output"]
    assert output["answer"] == "Thank you for: plain words\n | Invoice 42 | "
    listed = shown["message"]["attachments"]
    assert [one["name"] for one in listed] == ["note.txt", "invoice.pdf", "broken.pdf"]
    assert "cannot be read" in listed[2]["problem"]
    content = mailing.client.get(f"/v1/files/{listed[1]['file']}/content").content
    assert content == pdf_of("Invoice 42")
    assert len(mailing.client.get("/v1/files").json()["data"]) == 3, "a repeated delivery stores nothing"


def test_a_mail_of_which_a_part_was_not_read_is_kept_as_a_whole(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    raw = b"Content-Type: multipart/mixed; boundary=b\n\n" + b"--b\n\nx\n" * 300 + b"--b--\n"
    assert post(mailing, raw).status_code == 202

    (found,) = mailing.messages("mail")
    whole = full(mailing, found)["message"]["attachments"][-1]
    assert whole["name"] == "message.eml"
    assert mailing.client.get(f"/v1/files/{whole['file']}/content").content == raw


def test_files_beyond_the_room_of_a_namespace_are_refused_and_nothing_is_stored(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    sent = mail()
    sent.add_attachment(b"x" * 5_000, maintype="application", subtype="octet-stream", filename="a.bin")
    handoffs = HandoffService(mailing.database, "default", FileSettings(max_namespace_bytes=4_000))
    with pytest.raises(FileTooLarge):
        handoffs.receive_mail("mail", sent.as_bytes(), MailEnvelope("imap"))
    assert mailing.messages("mail") == []

    assert post(mailing, sent.as_bytes()).status_code == 202, "its sender tries again, and there is room"
    assert len(mailing.messages("mail")) == 1


def test_mails_of_a_thread_have_one_thread_in_whatever_order_they_come(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    chance = random.Random(9)
    for round_ in range(3):
        mailing.put(DOCUMENT.replace("handoff: mail", f"handoff: mail-{round_}"))
        path = f"/v1/hooks/default/mail-{round_}"
        mails = []
        for thread in range(3):
            for n in range(5):
                id_ = f"<{thread}.{n}@x>"
                before = [f"<{thread}.{m}@x>" for m in range(n)]
                # Some programs write only the mail that they answer.
                headers = {"In_Reply_To": before[-1]} if before else {}
                if before and chance.random() < 0.5:
                    headers["References"] = " ".join(before)
                mails.append((thread, mail(Message_ID=id_, Subject=f"{thread}.{n}", **headers).as_bytes()))
        chance.shuffle(mails)
        for _, raw in mails:
            assert post(mailing, raw, path=path).status_code == 202
        with mailing.database.work() as unit:
            rows = unit.rows(
                text("SELECT message_id, thread FROM mail_thread WHERE handoff = :name"), {"name": f"mail-{round_}"}
            )
        by_thread: dict[str, set[str]] = {}
        for row in rows:
            by_thread.setdefault(row.message_id[1], set()).add(row.thread)
        assert {key: len(names) for key, names in by_thread.items()} == {"0": 1, "1": 1, "2": 1}
        assert len(set().union(*by_thread.values())) == 3


def test_a_forged_mail_cannot_make_all_threads_one(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    for n in range(20):
        post(mailing, mail(n).as_bytes())
    post(mailing, mail(99, References=" ".join(f"<{n}@example.com>" for n in range(20))).as_bytes())

    with mailing.database.work() as unit:
        rows = unit.rows(text("SELECT count(DISTINCT thread) AS threads FROM mail_thread"))
    assert rows[0].threads >= 18


# Answers


def test_a_mail_is_answered_once_when_its_workflow_has_ended(mailing: HandoffWorld, postbox: Postbox) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    for _ in range(5):
        post(mailing, mail(References="<0@example.com>", Reply_To="Office <office@example.com>").as_bytes())
    assert postbox.mails == []
    for _ in range(3):
        work(mailing)

    (answer,) = postbox.mails
    assert answer.get_content().strip() == "Thank you for: Question 1"
    assert (answer["To"], answer["From"], answer["Subject"]) == (
        "office@example.com",
        "support@arriero.example",
        "Re: Question 1",
    )
    assert (answer["In-Reply-To"], answer["References"]) == ("<1@example.com>", "<0@example.com> <1@example.com>")
    assert answer["Auto-Submitted"] == "auto-replied"
    (found,) = mailing.messages("mail")
    assert full(mailing, found)["stages"][-1]["detail"] == "sent to office@example.com"

    # What comes back is known as such, and ends there.
    assert post(mailing, answer.as_bytes()).status_code == 202
    del answer["X-Arriero-Handoff"]
    assert post(mailing, answer.as_bytes()).status_code == 202
    work(mailing)
    assert [one["state"] for one in mailing.messages("mail")] == ["skipped", "delivered"]
    assert len(postbox.mails) == 1


def test_an_answer_that_is_refused_for_now_is_sent_later_with_the_same_id(
    mailing: HandoffWorld, postbox: Postbox
) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    post(mailing, mail().as_bytes())
    postbox.refusals += ["451 later", "421 later"]
    for _ in range(3):
        work(mailing)
        mailing.run("UPDATE mail_reply SET due_at = now()")
    (answer,) = postbox.mails
    (found,) = mailing.messages("mail")
    assert answer["Message-ID"] == f"<{found['id']}.1@arriero.example>"

    mailing.run("UPDATE mail_reply SET state = 'waiting', due_at = now()")  # as after a crash before the record
    work(mailing)
    assert [one["Message-ID"] for one in postbox.mails] == [answer["Message-ID"]] * 2


def test_an_answer_that_is_refused_for_good_is_recorded(mailing: HandoffWorld, postbox: Postbox) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    post(mailing, mail().as_bytes())
    postbox.refusals += ["554 no"]
    work(mailing)
    mailing.run("UPDATE mail_reply SET due_at = now()")
    work(mailing)

    assert postbox.mails == []
    (found,) = mailing.messages("mail")
    assert "not sent: 127.0.0.1 answered 554" in full(mailing, found)["stages"][-1]["detail"]


def test_one_address_gets_only_so_many_answers(mailing: HandoffWorld, postbox: Postbox) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT.replace("text: 'output.answer'", "text: 'output.answer', max_per_hour: 3"))
    for n in range(5):
        post(mailing, mail(n, From="same@example.com").as_bytes())
    post(mailing, mail(8).as_bytes())
    work(mailing)
    assert sorted(one["To"] for one in postbox.mails) == ["person8@example.com"] + ["same@example.com"] * 3
    details = [full(mailing, one)["stages"][-1]["detail"] for one in mailing.messages("mail")]
    assert sum("within an hour" in one for one in details) == 2


@pytest.mark.parametrize("sender", ["no-reply@example.com", "postmaster@example.com", "nobody"])
def test_addresses_that_no_person_reads_get_no_answer(mailing: HandoffWorld, postbox: Postbox, sender: str) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    post(mailing, mail(From=sender).as_bytes())
    work(mailing)

    (found,) = mailing.messages("mail")
    assert found["state"] == "delivered"
    assert "no person reads" in full(mailing, found)["stages"][-1]["detail"]
    assert postbox.mails == []


def test_no_text_of_a_mail_writes_a_header_of_the_answer(mailing: HandoffWorld, postbox: Postbox) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    encoded = "=?utf-8?q?hello=0D=0ABcc:_victim=40example.com?="
    raw = mail().as_bytes().replace(b"Subject: Question 1", f"Subject: {encoded}".encode())
    post(mailing, raw.replace(b"Person 1 <person1@example.com>", b"<person1@example.com\x00\rBcc: x@y.example>"))
    post(mailing, mail(2).as_bytes().replace(b"Subject: Question 2", f"Subject: {encoded}".encode()))
    work(mailing)

    assert postbox.mails
    for answer in postbox.mails:
        assert answer["Bcc"] is None
    assert all(len(one) == 1 and "victim" not in one[0] for one in postbox.recipients)


# Tools, and routes

AGENT = """
workflow: with-agent
inputs: {subject: {type: string}, text: {type: string}, thread: {type: string}, attachments: {type: array}}
steps:
  - id: act
    kind: agent
    model: auto:chat
    prompt: "{{ inputs.text }}"
    tools: [{http: {name: get, description: gets, url: "https://example.com"}}]
"""
CALLER = """
workflow: caller
inputs: {subject: {type: string}, text: {type: string}, thread: {type: string}, attachments: {type: array}}
steps:
  - {id: act, kind: workflow, workflow: with-tools, inputs: {text: inputs.text}}
outputs: {answer: steps.act.output}
"""
TOOLS = """
workflow: with-tools
inputs: {text: {type: string}}
steps:
  - id: act
    kind: generate
    model: auto:chat
    prompt: "{{ inputs.text }}"
    tools: [{function: {name: pay, description: pays}}]
"""


def test_mail_reaches_no_step_with_tools_unless_the_definition_says_so(mailing: HandoffWorld) -> None:
    put_workflow(mailing, TOOLS, "with-tools")
    put_workflow(mailing, CALLER, "caller")
    document = DOCUMENT.replace("workflow: sort-mail", "workflow: caller")
    headers = {"content-type": "application/yaml"}
    refused = mailing.client.put("/v1/handoffs/mail", content=document, headers=headers)
    assert refused.status_code == 422
    assert "'act' of the workflow 'with-tools' offers tools to its model" in refused.text

    mailing.put(document.replace("kind: email", "kind: email\n  allow_tools: true"))


def test_what_follows_a_mail_reaches_no_tools_either(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    put_workflow(mailing, TOOLS, "with-tools")
    mailing.put(
        "handoff: after\nsource: {kind: api}\nmapping: {cel: message}\ntarget: {kind: workflow, workflow: with-tools}"
    )
    document = DOCUMENT + "then: [{handoff: after, cel: '{\"text\": message.text}'}]\n"
    refused = mailing.client.put("/v1/handoffs/mail", content=document, headers={"content-type": "application/yaml"})
    assert refused.status_code == 422
    assert "'act' of the workflow 'with-tools'" in refused.text


def test_a_workflow_that_gets_tools_later_gets_no_mail(mailing: HandoffWorld) -> None:
    put_workflow(mailing, WORKFLOW, "sort-mail")
    mailing.put(DOCUMENT)
    put_workflow(mailing, TOOLS.replace("with-tools", "sort-mail"), "sort-mail")
    post(mailing, mail().as_bytes())
    mailing.work()

    (found,) = mailing.messages("mail")
    assert found["state"] == "failed"
    assert "offers tools" in found["problems"][0]["message"]
    assert mailing.client.get("/v1/runs").json()["runs"] == []


ROUTES = """
handoff: mail
source: {kind: email, http: {secret: mail}, reply: {sender: support@arriero.example, text: 'output.answer'}}
mapping: {cel: '{"subject": message.subject, "text": message.text}'}
target:
  kind: routes
  routes:
    - {workflow: bills, when: 'inputs.payload.subject.contains("invoice")', description: bills that we must pay}
    - {workflow: homes, when: 'inputs.payload.subject.contains("visit")'}
  otherwise: others
"""
ROUTED = """
workflow: NAME
inputs: {payload: {type: object}}
steps:
  - {id: answer, kind: transform, cel: '"NAME: " + inputs.payload.subject'}
outputs: {answer: steps.answer.output}
"""


def test_rules_choose_the_workflow(mailing: HandoffWorld, postbox: Postbox) -> None:
    for name in ("bills", "homes", "others"):
        put_workflow(mailing, ROUTED.replace("NAME", name), name)
    mailing.put(ROUTES)
    subjects = ["invoice 7", "a visit", "hello", "invoice of a visit"]
    for n, subject in enumerate(subjects):
        post(mailing, mail(n, Subject=subject).as_bytes())
    work(mailing)
    work(mailing)

    assert {one["state"] for one in mailing.messages("mail")} == {"delivered"}
    assert sorted(one.get_content().strip() for one in postbox.mails) == [
        "bills: invoice 7",
        "bills: invoice of a visit",
        "homes: a visit",
        "others: hello",
    ]


def test_a_model_is_asked_only_where_no_rule_holds_and_can_only_name_a_route() -> None:
    document = ROUTES.replace("otherwise: others", "otherwise: others\n  model: tiny")
    handoff = check.parse(document)
    workflow = delivery.workflow_of(handoff)
    assert workflow is not None
    steps = {step.id: step for step in workflow.steps}
    assert steps["choose"].needs == ("rule.model",)
    choose = steps["choose"]
    assert isinstance(choose, GenerateStep)
    assert choose.output is not None
    assert choose.output.schema_["properties"]["route"]["enum"] == ["bills", "none"]
    assert choose.tools == ()
    assert steps["to_0"].needs == ("rule.to_0", "choice.to_0")
    assert steps["to_1"].needs == ("rule.to_1",)
    assert steps["to_2"].needs == ("choice.to_2",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("http: {secret: mail}, ", ""), "at least one of 'imap', 'smtp' and 'http'"),
        (("sender: support@arriero.example", "sender: nobody"), "is no address"),
        (("http: {secret: mail}", 'imap: {host: x, password: mail, user: "a\\r\\nb"}'), "imap.user"),
        (("text: 'output.answer'", "text: 'outputs.answer'"), "outputs"),
        (("otherwise: others", "otherwise: others\n  x: 1"), "unknown field"),
        (("when: 'inputs.payload.subject.contains(\"visit\")'", "version: 1"), "is never taken"),
        (
            ("description: bills that we must pay}", "description: bills}\n    - {workflow: bills, when: 'true'}"),
            "one route",
        ),
    ],
)
def test_what_is_wrong_with_a_definition_is_said(change: tuple[str, str], says: str) -> None:
    assert change[0] in ROUTES
    with pytest.raises(InvalidInput) as error:
        check.parse(ROUTES.replace(*change))
    assert says in str(error.value)
